"""metrics.jsonl: one line per training step, the same bytes for an interrupted run as for one that was not."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrainer.errors import RunError
from kdtrainer.ranks import Ranks


class MetricsLog:
    """Appends to a file that is first cut back to the steps that a checkpoint vouches for."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep_bytes and not path.exists():
            raise RunError(
                f"{path} is missing, but the checkpoints count on it: put it back, or start afresh, without --resume"
            )
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise RunError(f"{path} has {size} bytes, but its checkpoint counts on {keep_bytes}: it was changed since")
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring all lines to the disk, and say how many bytes they are: a checkpoint may now count on them."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


@contextmanager
def leading(ranks: Ranks, path: Path, keep: Callable[[], int]) -> Iterator[MetricsLog | None]:
    """The leading process's log, within the block; None elsewhere.

    `keep` says how many bytes the checkpoints count on. It may clear what an earlier run left: no process looks for a
    checkpoint before that is done.
    """
    log = ranks.led(lambda: MetricsLog(path, keep()))
    try:
        yield log
    finally:
        if log:
            log.close()


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each task, in order."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            tasks.setdefault(record["task"], []).append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} has a line that is none of a run's: it was changed since") from error
    return tasks
