"""Checkpoints in safetensors: whole or not there, and enough to go on with the same bits."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from kdtrainer.errors import RunError

MODEL, OPTIMIZER, RNG, EXTRA = "model.", "optimizer.", "rng.torch", "extra."
NAME, DIGEST = "name", "digest"  # of a file's plain values
REPORTS = ("report.json", "report.md")  # of a run that ended: a fresh one has none yet

Kind = TypeVar("Kind")


class AnyConfig(Protocol):
    """What a run depends on."""

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Progress:
    """Where training stood: `metrics_bytes` of the metrics file were written, `seconds` had been spent."""

    step: int
    metrics_bytes: int
    seconds: float


def write_atomically(path: Path, content: bytes) -> None:
    """After a crash at any moment, `path` holds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk has no room for half a file either
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    _sync_directory(path.parent)


def save(
    path: Path,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: AnyConfig,
    progress: Any,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Weights, optimiser state, random number state, config, progress and what else there is, in one file.

    `progress` is a dataclass of plain values.
    """
    tensors = {MODEL + name: value for name, value in trained.state_dict().items()}
    for index, state in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in state.items()}
    tensors[RNG] = torch.get_rng_state()
    tensors |= {EXTRA + name: value for name, value in (extra or {}).items()}
    write(path, tensors, {"config": config.as_json(), "progress": progress.__dict__})


def write(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Tensors and plain values in one file, with a digest of them all; `read` and `value_of` are the inverse.

    The file knows its own name: another one's content in its place is noticed.
    """
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in {**values, NAME: path.name}.items()}
    metadata[DIGEST] = _digest(tensors, metadata)
    write_atomically(path, bytes_of(tensors, metadata))


def prepare(out: Path, resume: bool, config: AnyConfig, field: str = "seed") -> int:
    """`check` a run that goes on, `clear` the folder of a fresh one; the bytes of metrics that are to be kept."""
    return check(out, config, field) if resume else clear(out)


def clear(out: Path) -> int:
    """Remove an earlier run; no bytes of metrics are to be kept. Raises RunError where a file is not ours to remove."""
    found = _all_of(out)
    for path in found:
        if _is_foreign(path):
            raise RunError(f"{path} is no checkpoint of kdtrainer, and a fresh run would remove it: give another --out")
    for path in (*found, *(out / name for name in REPORTS)):
        path.unlink(missing_ok=True)
    return 0


def check(out: Path, config: AnyConfig, field: str = "seed") -> int:
    """The bytes of metrics that the checkpoints count on. Raises RunError where the run cannot go on.

    Checkpoints of several seeds are named by theirs: seed3-… must be of this config with 3 in its `field`.
    """
    found = _all_of(out)
    if not found:
        print(f"no checkpoint in {out}: the run starts from the beginning")
    for path in found:
        read(path)  # whole, before anything is written
        check_config(path, _of_its_seed(config, path, field))
    return max((value_of(path, "progress")["metrics_bytes"] for path in found), default=0)


def _all_of(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("*.safetensors"))


def _of_its_seed(config: Any, path: Path, field: str) -> Any:
    seed = path.name.removeprefix("seed").partition("-")[0]
    return replace(config, **{field: int(seed)}) if seed.isdigit() else config


def restore(path: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save`, torch's generator included; what to build first is in the config."""
    tensors = read(path)
    trained.load_state_dict(_under(MODEL, tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(OPTIMIZER, tensors).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors[RNG])


def weights(path: Path) -> dict[str, Tensor]:
    """The trained weights alone."""
    return _under(MODEL, read(path))


def extra(path: Path) -> dict[str, Tensor]:
    """What else was saved."""
    return _under(EXTRA, read(path))


def value_of(path: Path, name: str) -> Any:
    """One of the plain values."""
    try:
        return json.loads(_metadata(path)[name])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error


def progress(path: Path) -> Progress:
    return progress_of(path, Progress)


def progress_of(path: Path, kind: type[Kind]) -> Kind:
    """Of the kind that was saved."""
    return kind(**value_of(path, "progress"))


def check_config(path: Path, config: AnyConfig) -> None:
    """Raise RunError, naming the differences, unless the checkpoint is of a run with this config."""
    saved = value_of(path, "config")
    asked = config.as_json()
    differences = [
        f"{name} was {saved.get(name)!r} and is now {asked.get(name)!r}"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]
    if differences:
        raise RunError(
            f"cannot resume {path.parent.parent}: its config is another ({'; '.join(differences)}). "
            "Give the options it was started with, or start afresh in another --out"
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; not one bit of them, nor of the header, other than it was saved there."""
    try:
        tensors = tensors_from(path.read_bytes())
    except SafetensorError as error:
        raise _damaged(path) from error
    metadata = _metadata(path)
    if metadata.pop(DIGEST, None) != _digest(tensors, metadata) or metadata.get(NAME) != json.dumps(path.name):
        raise _damaged(path)
    return tensors


def _digest(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, Any]:
    """The header alone: eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        return dict(json.loads(header)["__metadata__"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise _damaged(path) from error


def _is_foreign(path: Path) -> bool:
    """Whether it is a whole file of safetensors, and none of ours. What is damaged may have been ours."""
    try:
        with safe_open(path, "pt") as file:
            return DIGEST not in (file.metadata() or {})
    except SafetensorError:
        return False


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is no checkpoint of kdtrainer, or was damaged: start afresh, without --resume")


def _sync_directory(path: Path) -> None:
    """Make the renaming itself durable, where the system lets a directory be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
