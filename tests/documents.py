"""Pages and examples as programs: the code of a page runs block after block, its commands are parsed."""

import contextlib
import io
import re
import runpy
import shlex
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

from kdkernels.__main__ import parser as kdkernels_parser
from kdtrainer.cli import parser as kdtrainer_parser

DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if not path.is_symlink())  # those stand elsewhere
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Numbers of a page whose code is of a real size, and what stands in their place when it runs here.
SMALLER = {"README.md": {"64, 100, ": "2, 10, ", "51865": "1001"}}

FENCE = re.compile(r"^```(?: \{ \.)?(\w*)(?: \})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'^--8<-- "(.+)"$')  # a file of the repository; in { .python }, which ruff does not format
COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:python|make|pip|torchrun) [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Wrong(Exception):
    """What a page says is not so; the message begins with the page and the line."""


class Block(NamedTuple):
    page: Path
    line: int  # of the first line within
    language: str
    text: str

    def wrong(self, message: str, line: int | None = None) -> Wrong:
        return Wrong(f"{name_of(self.page)}:{line or self.line}: {message}")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks_of(page: Path, *languages: str) -> list[Block]:
    source = page.read_text()
    found = (Block(page, source[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(source))
    return [block for block in found if block.language in languages]


def run_page(page: Path) -> None:
    """Its Python blocks, in one namespace. Raises Wrong where one fails."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page, "python"):
        included = INCLUDED.match(block.text)
        if included:
            if not (ROOT / included[1]).is_file():
                raise block.wrong(f"there is no {included[1]}")
            continue
        try:  # the lines above are empty, so that errors are at the page's own lines
            exec(compile("\n" * (block.line - 1) + shrunk(block), str(page), "exec"), namespace)
        except Exception as error:
            at = error.lineno if isinstance(error, SyntaxError) else line_in(page, error)
            raise block.wrong(f"{type(error).__name__}: {error}", at) from error


def shrunk(block: Block) -> str:
    """Its code, of the sizes that run here."""
    text = block.text
    for large, small in SMALLER.get(name_of(block.page), {}).items():
        text = text.replace(large, small)
    return text


def line_in(page: Path, error: Exception) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
    return lines[-1] if lines else None


def run_example(path: Path) -> None:
    """As `python path`. Raises Wrong where it fails."""
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception as error:
        where = f"{name_of(path)}:{line_in(path, error)}"
        raise Wrong(f"{where}: {type(error).__name__}: {error}") from error


def check_commands(page: Path) -> int:
    """How many commands it names. Raises Wrong where one cannot be given."""
    found = 0
    for block in commands_of(page):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                check_command(shlex.split(block.text, comments=True))
            except SystemExit as end:
                if end.code:
                    raise block.wrong(f"{block.text}: {said.getvalue().strip().splitlines()[-1]}") from end
            except ValueError as error:
                raise block.wrong(f"{block.text}: {error}") from error
        found += 1
    return found


def commands_of(page: Path) -> Iterator[Block]:
    """One command each: the lines of shell blocks, and those within the text."""
    for block in blocks_of(page, "sh", "bash", "console"):
        for offset, text in enumerate(block.text.splitlines()):
            if shlex.split(text, comments=True):
                yield block._replace(line=block.line + offset, text=text)
    source = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())
    for match in COMMAND.finditer(source):
        yield Block(page, source[: match.start()].count("\n") + 1, "sh", " ".join(match[1].split()))


def check_command(words: list[str]) -> None:
    """Raises ValueError, or SystemExit of a parser."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["python", "-m", "kdkernels", *options]:
            parse(kdkernels_parser(), options)
        case ["python", "-m", "kdtrainer", *options] | ["torchrun", _, "-m", "kdtrainer", *options]:
            parse(kdtrainer_parser(), options)
        case ["python", script]:
            if not (ROOT / script).is_file():
                raise ValueError(f"there is no {script}")
        case ["make", target]:
            if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise ValueError(f"the Makefile has no {target}")
        case ["pip", "install", what]:
            unknown = set(extras_in(what)) - extras()
            if unknown:
                raise ValueError(f"there is no extra {', '.join(unknown)}")
        case _:
            raise ValueError("nothing here knows this command")


def parse(parser: ArgumentParser, options: list[str]) -> None:
    parser.parse_args(options)


def extras_in(requirement: str) -> list[str]:
    found = re.search(r"\[(.+)\]", requirement)
    return found[1].split(",") if found else []


def extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return set(re.findall(r"^([\w-]+) = ", section.partition("\n[")[0], re.MULTILINE))


def check_links(page: Path) -> None:
    """Raises Wrong where a file or a heading of the repository that the page links to is not there."""
    source = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())
    for match in LINK.finditer(source):
        target, _, anchor = match[1].partition("#")
        line = source[: match.start()].count("\n") + 1
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            raise Wrong(f"{name_of(page)}:{line}: there is no {target}")
        if anchor and anchor not in anchors_of(file):
            raise Wrong(f"{name_of(page)}:{line}: {target or 'the page'} has no heading #{anchor}")


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
