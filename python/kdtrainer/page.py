"""What a run tells at its end: a table in the terminal, and the same in report.md with its pictures and its origin."""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich import table as rich_table
from rich.console import Console

from kdkernels.cli.machine import machine
from kdtrainer.checkpoint import write_atomically
from kdtrainer.errors import RunError

REPORT = "report.json"


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; the first columns hold words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    bold: Sequence[str] = ()  # rows, by their first cell
    ends: Sequence[str] = ()  # likewise, of those below which a section ends

    def for_terminal(self) -> rich_table.Table:
        shown = rich_table.Table(title=self.title, title_justify="left", box=box.SIMPLE)
        for k, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if k < self.words else "right")
        for row in self.rows:
            shown.add_row(*row, style="bold" if row[0] in self.bold else "", end_section=row[0] in self.ends)
        return shown

    def for_page(self) -> str:
        """Markdown."""
        rule = ["---" if k < self.words else "---:" for k in range(len(self.columns))]
        rows = [[f"**{x}**" if x and row[0] in self.bold else x for x in row] for row in self.rows]
        lines = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in (self.columns, rule, *rows)]
        return "\n".join([self.title, "", *lines])


@dataclass(frozen=True)
class Page:
    """A run, told."""

    title: str
    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    pictures: Sequence[str] = ()  # names of files beside it
    files: Sequence[str] = field(default=("metrics.jsonl", "checkpoints"))  # what else is beside it

    def show(self, out: Path) -> None:
        """In the terminal."""
        terminal = console()
        for table in self.tables:
            terminal.print(table.for_terminal())
        for line in self.remarks:
            terminal.print(line, highlight=False)
        *names, last = "report.md", REPORT, *self.pictures, *self.files
        terminal.print(f"{', '.join(names)} and {last} are in {out}", highlight=False)

    def write(self, path: Path, content: dict[str, Any]) -> None:
        """As report.md; `content` is that of report.json."""
        parts = [f"# {self.title}", *(table.for_page() for table in self.tables), *self.remarks]
        parts += [f"![{name.removesuffix('.png')}]({name})" for name in self.pictures]
        parts += ["## How it was made", f"```sh\n{content['command']}\n```", made_with(content)]
        options = json.dumps(content["config"], indent=2)
        parts += [f"All options:\n\n```json\n{options}\n```"]
        write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def console() -> Console:
    """A pipe or a log has no edge at which to wrap."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=160)


def spread(values: Sequence[float], digits: int, factor: float = 1.0, signed: bool = False) -> str:
    """Mean and standard deviation over seeds; `signed` shows the sign of the mean."""
    values = [factor * x for x in values]
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def origin(recipe: str) -> dict[str, Any]:
    """What report.json says of how it came to be: recipe, command, versions and machine."""
    world = os.environ.get("WORLD_SIZE", "1")
    start = ["python"] if world == "1" else ["torchrun", f"--nproc_per_node={world}"]
    return {"recipe": recipe, "command": shlex.join([*start, "-m", "kdtrainer", *sys.argv[1:]]), "machine": machine()}


def made_with(content: dict[str, Any]) -> str:
    """A sentence of machine and versions."""
    about = content["machine"]
    versions = {"kdkernels": about["kdkernels"], "Python": about["python"]} | about["packages"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f", commit {about['commit']}" if about["commit"] else ""
    devices = "".join(f", {device}" for device in about["cuda"])
    return f"On {about['cpu']}, {about['cpus']} CPUs, {about['threads']} threads{devices}; {shown}{commit}."


def write_json(out: Path, content: dict[str, Any]) -> None:
    write_atomically(out / REPORT, json.dumps(content, indent=2).encode() + b"\n")


def read_json(out: Path) -> dict[str, Any]:
    """Raises RunError where the folder has no report of a finished run."""
    path = out / REPORT
    if not path.exists():
        raise RunError(f"{path} is missing: {out} holds no finished run; its command with --resume finishes it")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise RunError(f"{path} does not say which recipe it is of: it is no report of kdtrainer's, or of an older one")
    return content


@contextmanager
def parsing(out: Path) -> Iterator[None]:
    """Raises RunError where what is read of report.json within the block is not what a run wrote."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RunError(f"{out / REPORT} is damaged, or of another version: {error!r}") from error
