"""What the configs of all recipes can do."""

import argparse
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kdtrainer.errors import RunError
from kdtrainer.numbers import number

Kind = TypeVar("Kind", bound="RunConfig")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Every field is kept in each checkpoint and in the report; a resumed run must have the same."""

    seed: int = 0
    world: int = 1  # processes that share every batch

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls: type[Kind], values: Mapping[str, Any]) -> Kind:
        """The inverse. Raises TypeError where a field is not this config's."""
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        return cls(**fields)

    @classmethod
    def chosen(cls, options: argparse.Namespace) -> dict[str, Any]:
        """What the options say of the fields."""
        return fields_in(options, cls)

    def seed_of(self, name: str) -> int:
        """A seed for one part of the run, so that no part depends on what ran before it."""
        return zlib.crc32(f"{self.seed}/{name}".encode())


def fields_in(options: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The options that are fields of the dataclass `kind`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def check_distils(alignment_weight: float, soft_targets: float) -> None:
    """Raise RunError where neither counts."""
    if not alignment_weight and not soft_targets:
        raise RunError("--alignment-weight and --soft-targets are both 0, so nothing is distilled: one must be above 0")


def quickly(parser: argparse.ArgumentParser, usual: Mapping[str, Any], quick: Mapping[str, Any]) -> Callable[..., None]:
    """Add --quick. What is returned adds an option that it changes; `usual` and `quick` are the two defaults."""
    shown = "less of everything, for a look; options that are given stay as they are"
    parser.add_argument("--quick", action="store_true", help=shown)

    def add(option: str, help: str, metavar: str = "COUNT", kind: Any = None) -> None:
        field = option.removeprefix("--").replace("-", "_")
        text = f"{help} (default: {usual[field]}; with --quick: {quick[field]})"
        kind = kind or number(int, 1)
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)

    return add
