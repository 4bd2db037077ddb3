"""A few processes that work through many files, each file within a time limit.

A file that brings a decoder down takes one process with it, not the program: the series is then held.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

from deid_tools.admit import Refusal
from deid_tools.silence import silence_for_good
from medlsdm.errors import MedlsdmError

FILE_SECONDS = 120
CHUNK = 16
_TOO_LONG = f"it takes longer than {FILE_SECONDS} seconds to work through"
_BROKEN = "a process that worked on it died"

_state: Any = None
Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def deaf_to_stops() -> Iterator[None]:
    """Keep SIGINT and SIGTERM from processes that are started in the block.

    A terminal and a service manager send them to all at once. They are for the leader, who ends the others; a helper
    that dies first would look like a file that cannot be read.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def time_limit(seconds: float = FILE_SECONDS, error: Exception | None = None) -> Iterator[None]:
    """Raise ``error``, or a Refusal, where the block takes longer; in the main thread only, elsewhere is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error or Refusal(_TOO_LONG)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Crew:
    """Run a function over jobs in processes of its own, in order; with one worker, in this process.

    Args:
        workers: How many processes.
        here: What this process works with, where it does the work itself.
        make: Makes what each other process works with; called once in each, with ``arguments``.
        arguments: What ``make`` is called with; they must pickle.
    """

    def __init__(self, workers: int, here: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._workers, self._here = max(1, workers), here
        self._make, self._arguments = make, arguments
        self._pool: Future[ProcessPoolExecutor] | None = None

    @property
    def workers(self) -> int:
        """Return how many processes there are."""
        return self._workers

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.result().shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(
        self,
        work: Callable[[Any, Job], Result],
        jobs: Sequence[Job],
        *,
        seconds: float,
        isolate: bool = False,
        early: bool = False,
    ) -> Iterator[Result]:
        """Yield ``work(made, job)`` for each job, in order, two jobs a process ahead at most.

        Args:
            work: A function of a module; it gets what ``make`` made, and a job.
            jobs: The jobs.
            seconds: How long one job may take.
            isolate: Leave even a single job to another process: decoders of compressed pixels may end it.
            early: Begin in this process while the others start, which takes as long as some hundred headers.

        Raises:
            Refusal: A process died or a job took too long.
        """
        if not isolate and (self._workers == 1 or len(jobs) < 2):
            yield from (work(self._here, job) for job in jobs)
            return
        ahead: list[Future[Result]] = []
        waiting = iter(jobs)
        try:
            while early and not self._is_ready() and (job := next(waiting, None)) is not None:
                yield work(self._here, job)
            for job in waiting:
                ahead.append(self._submit(work, job))
                if len(ahead) >= 2 * self._workers:
                    yield ahead.pop(0).result(seconds)
            while ahead:
                yield ahead.pop(0).result(seconds)
        except BrokenProcessPool:
            self._kill()
            raise Refusal(_BROKEN) from None
        except TimeoutError:
            self._kill()
            raise Refusal(_TOO_LONG) from None
        except (KeyboardInterrupt, SystemExit):
            self._kill()
            raise
        finally:
            for future in ahead:
                future.cancel()

    def _is_ready(self) -> bool:
        """Tell whether the processes have started; the first call lets them start."""
        if self._pool is None:
            thread = ThreadPoolExecutor(1)
            self._pool = thread.submit(self._start)
            thread.shutdown(wait=False)
        return self._pool.done()

    def _submit(self, work: Callable[[Any, Job], Result], job: Job) -> Future[Result]:
        self._is_ready()
        assert self._pool is not None
        return self._pool.result().submit(_work, work, job)

    def _start(self) -> ProcessPoolExecutor:
        """Start all processes and wait until they are ready."""
        resource_tracker.ensure_running()  # before: starting it makes this thread hear again
        with deaf_to_stops():
            return self._started()

    def _started(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self._make.__module__, "deid_tools.run_images", "deid_tools.engine"])
        pool = ProcessPoolExecutor(
            self._workers, context, initializer=_set_up, initargs=(os.getpid(), self._make, self._arguments)
        )
        wait([pool.submit(os.getpid) for _ in range(self._workers)])
        return pool

    def _kill(self) -> None:
        """End processes that do not come back."""
        if self._pool is None:
            return
        pool = self._pool.result()
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def _set_up(leader: int, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _state
    silence_for_good()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # compiled decoders write there themselves
    threading.Thread(target=_end_with, args=(os.pidfd_open(leader),), daemon=True).start()
    _state = make(*arguments)


def _end_with(leader: int) -> None:
    """End this process when the one that it works for is gone, even if that was killed: it holds patients' headers."""
    select.select([leader], [], [])
    os._exit(1)


def _work(work: Callable[[Any, Job], Result], job: Job) -> Result:
    try:
        return work(_state, job)
    except (Refusal, MedlsdmError, OSError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException:  # whatever else it is, it might not even travel back: a panic of a compiled decoder does not
        raise Refusal(_BROKEN) from None


def chunks(jobs: Sequence[Job], size: int = CHUNK) -> list[Sequence[Job]]:
    """Cut jobs into stretches of ``size``."""
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]
