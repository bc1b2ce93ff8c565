"""Tables: by rich where it is installed, in plain text otherwise."""

from collections.abc import Sequence
from importlib.util import find_spec

RED, GREEN, DIM = "red", "green", "dim"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """Print rows of text under `columns`; `styles` colours whole rows. Columns of numbers are aligned to the right."""
    styles = styles or [""] * len(rows)
    right = [bool(rows) and all(is_number(row[i]) for row in rows) for i in range(len(columns))]
    if find_spec("rich") is None:
        print_plain(title, columns, rows, right)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, numbers in zip(columns, right, strict=True):
        table.add_column(name, justify="right" if numbers else "left")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*row, style=style)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:  # a pipe or a log has no edge at which to wrap
        console = Console(markup=False, highlight=False, width=240)
    console.print(table)


def print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """The same without rich."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(f"\n{title}")
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(cells).rstrip())


def is_number(text: str) -> bool:
    """Whether a cell holds a number, a ratio or a share, or nothing."""
    return text.strip("×%~ ").replace(".", "").replace("e-", "").replace("-", "").replace(",", "").isdigit() or not text
