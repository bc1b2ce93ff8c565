"""Processes that share a batch, as `torchrun` starts them. Alone, there is one, and nothing is sent."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd
from kdtrainer.errors import Interrupted, RunError

Result = TypeVar("Result")

CPU = torch.device("cpu")
PATIENCE = timedelta(hours=24)  # all wait while the leading process makes data or evaluates


@dataclass(frozen=True)
class Ranks:
    """This process among the others; `together` finds out."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def check_shares(self, sizes: Mapping[str, int]) -> None:
        """Raise RunError unless every process would have as much as the others of each: batches, by what sets them."""
        for name, size in sizes.items():
            if size % self.world:
                raise RunError(f"{name} is {size}, but must be a multiple of the {self.world} processes")

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a batch."""
        self.check_shares({"a batch": len(indices)})
        return indices[self.rank :: self.world]

    def weight(self, count: int | Tensor) -> float:
        """What makes the mean over this process's `count` points a part of the mean over all processes' points."""
        if self.world == 1:
            return 1.0
        return int(count) * self.world / max(sum(self.gather(int(count))), 1)

    @contextmanager
    def own_chance(self) -> Iterator[None]:
        """Within the block, what is drawn (masks) differs between processes, and changes nothing that is drawn behind
        it (batches): these are the same in every process, and for every number of processes."""
        state = torch.get_rng_state()
        torch.manual_seed(zlib.crc32(state.numpy().tobytes()) * self.world + self.rank)
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each of them."""
        if self.world == 1:
            return
        found = list(tensors)
        flat = torch.cat([x.reshape(-1) for x in found])
        dist.all_reduce(flat)
        for x, mean in zip(found, (flat / self.world).split([x.numel() for x in found]), strict=True):
            x.copy_(mean.view_as(x))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Over all processes, name by name."""
        gathered = self.gather(values)
        return {name: sum(each[name] for each in gathered) / self.world for name in values}

    def led(self, work: Callable[[], Result]) -> Result | None:
        """What `work()` returns in the leading process, which alone does it; None elsewhere.

        Where it raises, all raise: no process waits for one that gave up.
        """
        if self.world == 1:
            return work()
        result, failure = None, None
        if self.leads:
            try:
                result = work()
            except BaseException as error:
                failure = error
        what = None if failure is None else (isinstance(failure, (Interrupted, KeyboardInterrupt)), str(failure))
        what = self.gather(what)[0]
        if failure is not None:
            raise failure
        if what is not None:
            interrupted, why = what
            raise Interrupted if interrupted else RunError(why)
        return result

    def wrap(self, model: nn.Module) -> nn.Module:
        """What averages gradients; anew after parameters were replaced."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer, states: list[int], before: list[int]) -> None:
        """Have what the leading process has after its layers went from `before` to `states`."""
        if self.world == 1:
            return
        content: list[Any] = [(states, model.state_dict(), optimizer.state_dict()) if self.leads else None]
        dist.broadcast_object_list(content, device=self.device)
        states, weights, moments = content[0]
        if self.leads:
            return
        if states != before:
            kd.nn.keep_states(model, optimizer, states=[torch.arange(n) for n in states])  # of this shape
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, model: nn.Module) -> None:
        """Raise RunError unless all processes ended with the same parameters, bit for bit."""
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        found = self.gather(digest.hexdigest())
        if len(set(found)) > 1:
            raise RunError(f"the processes ended with different parameters: {', '.join(x[:12] for x in found)}")


ALONE = Ranks()


@contextmanager
def together(device: str = "cpu") -> Iterator[Ranks]:
    """The processes that torchrun started, each on its device; without torchrun, this one."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own = torch.device(device)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RunError("--device is cuda, but torch finds no CUDA device")
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    start = world > 1 and not dist.is_initialized()
    if start:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, world, own)
    finally:
        if start and dist.is_initialized():
            dist.destroy_process_group()
