"""Processes that fail one by one: an executor in which a death concerns a single point."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any

from tolerax.problems.task import PointTimeoutError


class Processes:
    """An executor of `count` spawned processes, each a pool of its own.

    In one common pool the death of a process takes the points of all others with it, and nobody
    knows which point was the cause. Here the others go on. A process in which a call hangs after
    its deadline is replaced too. At most `count` futures may be unfinished at a time.
    """

    # Of points that are lost each was the cause itself.
    isolates = True

    def __init__(self, count: int):
        self._max_workers = count
        self._context = multiprocessing.get_context("spawn")
        self._lock = threading.Lock()
        self._idle: list[ProcessPoolExecutor | None] = [None] * count
        self._busy: list[ProcessPoolExecutor] = []
        self._lost: list[ProcessPoolExecutor] = []

    def submit(self, fn: Callable, /, *args: Any) -> Future:
        """Run `fn(*args)` in a process that is free."""
        self.mend()
        with self._lock:
            if not self._idle:
                raise RuntimeError(f"all {self._max_workers} processes are busy")
            # Those that run come last.
            pool = self._idle.pop()
        if pool is not None:
            try:
                return self._started(pool, pool.submit(fn, *args))
            except BrokenExecutor:  # it died while nobody asked it
                self._lost.append(pool)
        pool = ProcessPoolExecutor(1, mp_context=self._context)
        return self._started(pool, pool.submit(fn, *args))

    def _started(self, pool: Any, inner: Future) -> Future:
        outer = Future()
        outer.set_running_or_notify_cancel()
        with self._lock:
            self._busy.append(pool)
        inner.add_done_callback(lambda inner: self._ended(pool, inner, outer))
        return outer

    def _ended(self, pool: Any, inner: Future, outer: Future) -> None:
        error = inner.exception()
        with self._lock:
            self._busy.remove(pool)
            if isinstance(error, BrokenExecutor | PointTimeoutError):
                # Ended in `mend`: this is called by a thread of the pool, which holds its lock.
                self._lost.append(pool)
                self._idle.insert(0, None)
            else:
                self._idle.append(pool)
        if error is None:
            outer.set_result(inner.result())
        else:
            outer.set_exception(error)

    def mend(self) -> None:
        """End the processes that are lost; new ones start when they are needed."""
        with self._lock:
            lost, self._lost = self._lost, []
        for pool in lost:
            end(pool)

    def shutdown(self, wait: bool = True) -> None:
        """End all processes; with `wait` after they are done."""
        self.mend()
        with self._lock:
            pools = [pool for pool in self._idle if pool is not None] + self._busy
            self._idle = [None] * self._max_workers
        for pool in pools:
            if wait:
                pool.shutdown(wait=True)
            else:
                end(pool)


def end(executor: Any) -> None:
    """Shut an executor down at once, and kill its processes if it has some of its own."""
    # There is no public way to end a process pool in which a call hangs.
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()
    executor.shutdown(wait=False)
