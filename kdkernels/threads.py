"""Torch's threads, one piece of work each: where one piece keeps a second core half busy, and two keep both."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], *, on_cpu: bool = True) -> list[Result]:
    """`function` of each item, without gradients, computed in one thread: the same bits however many there are.

    Work that is not `on_cpu` is handed to its device by the caller's thread. The threads end with the call: a pool that
    outlived it would be dead in a forked process.
    """

    def alone(item: Item) -> Result:
        with torch.no_grad():  # which is each thread's own
            return function(item)

    before = torch.get_num_threads()
    if before == 1 or not on_cpu:
        return list(map(alone, items))
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(before)  # new threads would inherit the workers' single one
