"""What the configs of all recipes can do."""

import argparse
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

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
        fields = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in vars(options).items() if name in fields}

    def seed_of(self, name: str) -> int:
        """A seed for one part of the run, so that no part depends on what ran before it."""
        return zlib.crc32(f"{self.seed}/{name}".encode())
