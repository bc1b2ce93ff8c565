"""What a run shows while it trains: a line for each task."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """One line per task."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, name: str, steps: int) -> Callable[[int, float | None], None]:
        """What to call with the number of steps done and the last loss, where there is one."""
        shown = self._progress.add_task(name, total=steps, loss="")

        def update(step: int, loss: float | None) -> None:
            self._progress.update(shown, completed=step, loss="" if loss is None else f"loss {loss:.4f}")

        return update

    def tasks(self, name: str, steps: Sequence[int]) -> list[Callable[[int, float | None], None]]:
        """One line for several tasks, and what to call for each of them."""
        shown = self._progress.add_task(name, total=sum(steps), loss="")
        done = [0] * len(steps)

        def update(k: int, step: int, loss: float | None) -> None:
            done[k] = step
            self._progress.update(shown, completed=sum(done), loss="" if loss is None else f"loss {loss:.4f}")

        return [partial(update, k) for k in range(len(steps))]


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[ProgressBar]:
    """A line for each task, if they are to be shown."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield ProgressBar(progress)
