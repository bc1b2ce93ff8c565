"""Processes that share a batch, as `torchrun` starts them. Alone, there is one, and nothing is sent."""

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd
from kdtrainer.errors import RunError


class Ranks:
    """This process among the others."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RunError("--device is cuda, but torch finds no CUDA device")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a batch."""
        return indices[self.rank :: self.world]

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

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
