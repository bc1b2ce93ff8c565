"""Jobs in processes beside each other. What a job does is its own: never how many run, nor in which order they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import torch

from kdtrainer.errors import RunError
from kdtrainer.train import Interrupted, interruptions

OnStep = Callable[[int, float | None], None]
Watch = Callable[[], AbstractContextManager[Callable[[], bool]]]  # as `train.interruptions`
Work = Callable[[Any, OnStep, Watch], None]
RunAll = Callable[[Work, Sequence[Any], Sequence[OnStep]], None]

POLL = 0.1  # seconds between two looks at what the workers report

steps_of_workers: "Queue[tuple[int, int, float | None]]"  # in a worker: job, step, loss
stopped: Event  # in a worker: whether it is to end after this step


@contextmanager
def workers(count: int, threads: int) -> Iterator[RunAll]:
    """What runs `work(job, on_step, interruptions)` of all jobs: in so many processes, or with one in this process.

    It raises what a job raises, after the others have written what they have, and Interrupted after Ctrl-C.
    """
    with interruptions() as interrupted:
        if count == 1:
            yield partial(one_after_the_other, interrupted)
            return
        spawn = multiprocessing.get_context("spawn")
        steps, stop = spawn.Queue(), spawn.Event()
        with ProcessPoolExecutor(count, spawn, start, (threads, steps, stop)) as pool:
            try:
                yield partial(beside_each_other, pool, steps, stop, interrupted)
            finally:
                stop.set()


def one_after_the_other(
    interrupted: Callable[[], bool], work: Work, jobs: Sequence[Any], on_steps: Sequence[OnStep]
) -> None:
    for job, on_step in zip(jobs, on_steps, strict=True):
        if interrupted():
            raise Interrupted
        work(job, on_step, lambda: as_they_are(interrupted))


def beside_each_other(
    pool: ProcessPoolExecutor,
    steps: "Queue[tuple[int, int, float | None]]",
    stop: Event,
    interrupted: Callable[[], bool],
    work: Work,
    jobs: Sequence[Any],
    on_steps: Sequence[OnStep],
) -> None:
    futures = [pool.submit(call, work, k, job) for k, job in enumerate(jobs)]
    failures = follow(futures, steps, stop, interrupted, on_steps)
    for failure in sorted(failures, key=lambda each: isinstance(each, Interrupted)):
        if isinstance(failure, BrokenProcessPool):
            raise RunError("a worker ended where it should not (killed, or out of memory?): add --resume") from failure
        raise failure
    if interrupted():
        raise Interrupted


def follow(
    futures: Sequence["Future[None]"],
    steps: "Queue[tuple[int, int, float | None]]",
    stop: Event,
    interrupted: Callable[[], bool],
    on_steps: Sequence[OnStep],
) -> list[BaseException]:
    """Wait for all of them, and say how far they are. A failure or Ctrl-C ends them all, each after its step."""
    pending, failures = set(futures), []
    while pending:
        done, pending = wait(pending, POLL, FIRST_COMPLETED)
        failures += [failure for failure in map(failure_of, done) if failure is not None]
        while not steps.empty():
            k, step, loss = steps.get()
            on_steps[k](step, loss)
        if failures or interrupted():
            stop.set()
            pending = {future for future in pending if not future.cancel()}
    return failures


def failure_of(future: "Future[None]") -> BaseException | None:
    return None if future.cancelled() else future.exception()


@contextmanager
def as_they_are(interrupted: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    yield interrupted


def start(threads: int, steps: "Queue[tuple[int, int, float | None]]", stop: Event) -> None:
    """In a worker: Ctrl-C is the parent's to hear, and who loses the parent ends."""
    global steps_of_workers, stopped
    steps_of_workers, stopped = steps, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare(threads: int) -> None:
    """The same bits everywhere."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def call(work: Work, k: int, job: Any) -> None:
    """In a worker."""
    if stopped.is_set():
        raise Interrupted
    work(job, lambda step, loss: steps_of_workers.put((k, step, loss)), lambda: as_they_are(stopped.is_set))
