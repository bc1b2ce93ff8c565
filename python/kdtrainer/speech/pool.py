"""Jobs in processes beside each other. What a job does is its own: never how many run, nor in which order they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count as numbers_from
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import torch

from kdtrainer.errors import Interrupted, RunError
from kdtrainer.train import interruptions

OnStep = Callable[[int, float | None], None]
Watch = Callable[[], AbstractContextManager[Callable[[], bool]]]  # as `train.interruptions`
Work = Callable[[Any, OnStep, Watch], None]
RunAll = Callable[[Work, Sequence[Any], Sequence[OnStep]], None]

POLL = 0.1  # seconds between two looks at what the workers report

Report = tuple[int, float | None]  # a step, and its loss where there is one

steps_of_workers: "Queue[tuple[int, Report]]"  # in a worker: a job's number, and what it reports
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
                yield partial(beside_each_other, pool, numbers_from(), steps, stop, interrupted)
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
    numbers: Iterator[int],
    steps: "Queue[tuple[int, Report]]",
    stop: Event,
    interrupted: Callable[[], bool],
    work: Work,
    jobs: Sequence[Any],
    on_steps: Sequence[OnStep],
) -> None:
    running = {}
    for job, on_step in zip(jobs, on_steps, strict=True):
        number = next(numbers)
        with unheard():
            running[pool.submit(call, work, number, job)] = (number, on_step)
    failures = follow(running, steps, stop, interrupted)
    for failure in sorted(failures, key=lambda each: isinstance(each, Interrupted)):
        if isinstance(failure, BrokenProcessPool):
            raise RunError("a worker ended where it should not (killed, or out of memory?): add --resume") from failure
        raise failure
    if interrupted():
        raise Interrupted


def follow(
    running: "Mapping[Future[Report | None], tuple[int, OnStep]]",
    steps: "Queue[tuple[int, Report]]",
    stop: Event,
    interrupted: Callable[[], bool],
) -> list[BaseException]:
    """Wait for all of them, and say how far they are. A failure or Ctrl-C ends them all, each after its step.

    A job's result may overtake what it put into the queue before: it brings the last report with it, and what comes
    later from a job that has ended, of this call or of one before, is old.
    """
    on_steps, pending, failures = dict(running.values()), set(running), []
    while pending:
        done, pending = wait(pending, POLL, FIRST_COMPLETED)
        while not steps.empty():
            number, report = steps.get()
            if number in on_steps:
                on_steps[number](*report)
        for future in done:
            on_step = on_steps.pop(running[future][0])
            failure = None if future.cancelled() else future.exception()
            if failure is not None:
                failures.append(failure)
            elif not future.cancelled() and (last := future.result()) is not None:
                on_step(*last)
        if failures or interrupted():
            stop.set()
            pending = {future for future in pending if not future.cancel()}
    return failures


@contextmanager
def unheard() -> Iterator[None]:
    """Ctrl-C waits until the block has ended. A worker that is started within never hears it, not even before it has
    Python's signals to say so: its interpreter takes seconds to be there."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def as_they_are(interrupted: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    yield interrupted


def start(threads: int, steps: "Queue[tuple[int, Report]]", stop: Event) -> None:
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


def call(work: Work, number: int, job: Any) -> Report | None:
    """In a worker: the job's last report."""
    if stopped.is_set():
        raise Interrupted
    last = None

    def on_step(step: int, loss: float | None) -> None:
        nonlocal last
        last = (step, loss)
        steps_of_workers.put((number, last))

    work(job, on_step, lambda: as_they_are(stopped.is_set))
    return last
