"""Points of a Python function evaluated by workers that may fail, hang and die."""

import logging
import os
import queue
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from typing import Any, Literal, NamedTuple

from jaxtyping import PyTree

from tolerax.errors import WorkersLostError
from tolerax.problems.known import Known
from tolerax.problems.processes import Processes, end
from tolerax.problems.python_code import Row, Wanted, failed
from tolerax.problems.task import PointTimeoutError, Raised, here, loads, task

# New executors that may break before they evaluate anything: one may be killed by chance.
ATTEMPTS = 3

logger = logging.getLogger("tolerax")


class Lost(NamedTuple):
    """A point without an answer: a worker died, or (`silent`) nothing is heard of any. If the point
    was alone it was the cause, and has killed so many workers."""

    why: str
    kills: int = 0
    silent: bool = False


class TimedOut(NamedTuple):
    """A point without an answer before its deadline."""


Answer = Row | Raised | TimedOut | Lost


class _ThisProcess:
    """An executor with one worker: whoever calls."""

    _max_workers = 1

    def submit(self, fn: Callable, /, *args: Any) -> Future:
        future = Future()
        try:
            future.set_result(fn(*args))
        except PointTimeoutError as error:
            future.set_exception(error)
        return future


class Workers:
    """Evaluates a function in Python at many points, with workers that may fail, hang and die.

    Give it to `solve(..., executor=...)`, or give there what its first argument takes. The answers
    are told in the order of the questions: a run is the same, to the bit, with any number of
    workers, and when workers are killed.

    **Arguments:**

    - `executor`: a number of processes on this machine (spawned, not forked; one that dies takes no
      other point with it); a callable without
      arguments that makes an executor, which is called again when that breaks; an executor, that is
      anything with `submit(fn, *args)` that returns futures (it cannot be replaced when it breaks);
      or `None` for this process.
    - `deadline`: seconds that one evaluation may take on its worker; later the point is
      `PointStatus.timed_out` and its worker is replaced. (In this process, in threads, and in a
      pool that was given, the call that hangs cannot be stopped and goes on.)
    - `retries`: how often a point that killed its worker is tried again; then it is marked as
      failed, and never tried again. (Of several points that were lost at once each is tried again
      alone, to find the one that is to blame.)
    - `startup`: with a deadline, seconds beyond it without an answer from any worker after which
      all of them count as lost. Raise it where workers have to wait for machines.
    - `cache`: a point that was asked before, to the bit, is answered from memory and counts no
      work. Not for functions that are random: a second look at a point would be no second look.
    - `journal`: path of a file that takes every value as it comes. A run that was killed and is
      called again takes from it what it had got, in any order of workers, and goes on; points
      count as when they were evaluated. One that belongs to another function, or was damaged, is
      refused with `JournalError`.
    - `in_flight`: the most points submitted at once; the default is the number of workers of a
      pool, and no limit for others.

    What a callable makes is shut down when `solve` returns; to use the same workers for several
    runs, write `with Workers(...) as workers:` around them. An exception of the function is not the
    business of workers: see `on_error` of [`Objective`][].

    `counts` says how many points were `evaluated`, `cached` and `replayed` from the journal, and
    how many `raised`, `timed_out`, or were `lost`; and how many executors were `made`.
    `first_error` is the text of the first failure.

    >>> import numpy as np, jax.numpy as jnp, tolerax
    >>> box = tolerax.Objective(lambda x: float(np.sum(x**2)), host=True, bounds=(-3.0, 3.0))
    >>> workers = tolerax.Workers(cache=True, deadline=60.0)
    >>> solver = tolerax.CBO(particles=10)
    >>> solution = tolerax.solve(box, solver, jnp.ones(2), max_steps=5, executor=workers)
    >>> sum(workers.counts.values()), workers.counts["cached"] > 0
    (50, True)
    """

    def __init__(
        self,
        executor: Any = None,
        *,
        deadline: float | None = None,
        retries: int = 1,
        startup: float = 60.0,
        cache: bool = False,
        journal: str | os.PathLike[str] | None = None,
        in_flight: int | None = None,
    ):
        for option, seconds in (("deadline", deadline), ("startup", startup)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{option} is {seconds!r}: give a positive number of seconds.")
        if retries < 0:
            raise ValueError(f"retries is {retries!r}: give 0 or more.")
        if in_flight is not None and in_flight < 1:
            raise ValueError(f"in_flight is {in_flight!r}: give at least 1.")
        self.deadline, self.retries, self.startup = deadline, retries, startup
        self.in_flight = in_flight
        self.counts: Counter[str] = Counter()
        self.first_error: str | None = None
        self._make, self._given = _source(executor)
        self._cache, self._journal = cache, journal
        self._known: Known | None = None
        self._executor: Any = None
        self._trusted: Callable | None = None  # the function that the executor was tried with
        self._tainted = False  # a call hangs in a worker
        self._kept = False

    @classmethod
    def of(cls, executor: Any) -> "Workers":
        """`executor` itself if it is `Workers`."""
        return executor if isinstance(executor, Workers) else cls(executor)

    def __enter__(self) -> "Workers":
        self._kept = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._kept = False
        self.close()

    def close(self) -> None:
        """Shut down what was made here, and close the journal. The next evaluation begins anew."""
        self._discard()
        if self._known is not None:
            self._known.close()

    def release(self) -> None:
        """`close`, unless within a `with` block."""
        if not self._kept:
            self.close()

    # -- a batch of points ------------------------------------------------------------------------

    def evaluate(
        self,
        fun: Callable,
        points: Sequence[PyTree],
        wanted: Wanted,
        on_error: Literal["raise", "fail"] | str = "raise",
    ) -> list[Row]:
        """A row for each point, in their order.

        Raises what `fun` raises at the first point where it does, if `on_error` is `"raise"` or
        that is a `StopIteration`; and `WorkersLostError` when there are no workers any more.
        """
        if self._known is None or not self._known.is_about(fun, wanted):
            if self._known is not None:
                self._known.close()
            self._known = Known(fun, wanted, self._cache, self._journal, self.counts)
        known = self._known
        plan = known.plan(points, wanted)
        rows = plan.rows
        todo = deque(i for i in range(len(points)) if rows[i] is None and i not in plan.repeats)
        raised: dict[int, BaseException] = {}
        try:
            for i, answer in self._answers(fun, points, wanted, todo):
                self.counts["evaluated"] += 1
                if isinstance(answer, Raised):
                    if on_error == "raise" or isinstance(answer.error, StopIteration | SystemExit):
                        raised[i] = answer.error
                        while todo and todo[-1] > i:  # nobody will see these
                            todo.pop()
                        continue
                row = self._row(answer, points[i], wanted)
                rows[i] = row
                known.keep(plan.tickets[i], points[i], wanted, row)
        except BaseException:
            self._tainted = True  # calls are under way that nobody waits for
            raise
        known.sync()
        if self._tainted:
            self._discard()
        if raised:
            raise raised[min(raised)]
        for i, original in plan.repeats.items():
            self.counts["cached"] += 1
            rows[i] = _there(rows[original])._replace(calls=0)
        return [_there(row) for row in rows]

    def _row(self, answer: Answer, x: PyTree, wanted: Wanted) -> Row:
        if isinstance(answer, Row):
            return answer
        nothing = failed(x, wanted.derivatives)
        if isinstance(answer, Raised):
            text = answer.text
            self._report("raised", f"the objective raised {text}")
            return nothing._replace(outcome="raised", error=text[:1000])
        if isinstance(answer, TimedOut):
            self._report("timed_out", f"a point gave no value within {self.deadline} s")
            return nothing._replace(outcome="timed_out")
        text = f"the point {str(x)[:200]} killed its workers ({answer.why})"
        self._report("lost", f"{text}; it is not tried again", always=True)
        return nothing._replace(outcome="lost", error=text[:1000])

    def _report(self, kind: str, text: str, always: bool = False) -> None:
        """Say the first failure of a kind aloud; all are counted."""
        self.counts[kind] += 1
        first = self.counts[kind] == 1
        self.first_error = self.first_error or text
        level = logging.WARNING if first or always else logging.DEBUG
        more = " (more like this are counted, not reported)" if first and not always else ""
        logger.log(level, "%s: the point is marked as failed%s.", text, more)

    # -- answers as they come ---------------------------------------------------------------------

    def _answers(
        self, fun: Callable, points: Sequence[PyTree], wanted: Wanted, todo: deque[int]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers in any order. `todo` may be shortened by the reader."""
        width = self.in_flight
        kills: Counter[int] = Counter()
        while todo:
            again: list[int] = []
            for i, answer in self._round(fun, points, wanted, todo, width):
                if isinstance(answer, Lost):
                    kills[i] += answer.kills
                    if kills[i] <= self.retries:
                        again.append(i)
                        continue
                silent = isinstance(answer, Lost) and answer.silent
                yield i, TimedOut() if silent else answer
            todo.extend(sorted(again))
            # Whoever was under way when a worker died may have killed it. Alone, the guilty one
            # shows.
            width = self.in_flight if getattr(self._executor, "isolates", False) else 1

    def _round(
        self,
        fun: Callable,
        points: Sequence[PyTree],
        wanted: Wanted,
        todo: deque[int],
        in_flight: int | None,
    ) -> Iterator[tuple[int, Answer]]:
        """Submit every point once. A broken executor is replaced for the points that follow."""
        patience = None if self.deadline is None else self.deadline + self.startup
        home = here()
        while todo:
            executor = self._ready(fun)
            isolates = getattr(executor, "isolates", False)
            most = getattr(executor, "_max_workers", None) or len(points)
            limit = min(in_flight or most, most) if isolates else in_flight or most
            alone = isolates or limit == 1
            if isinstance(executor, _ThisProcess):
                # Whose answers are there at once.
                i = todo.popleft()
                answer = executor.submit(task, fun, points[i], wanted, self.deadline, home)
                yield i, self._read(answer, alone)
                continue
            # Futures of an executor that was given up must not be heard, hence a queue for each.
            done: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
            under_way: dict[int, Future] = {}
            try:
                while under_way or (todo and self._trusted is not None):
                    while todo and len(under_way) < limit and self._trusted is not None:
                        i = todo.popleft()
                        try:
                            future = executor.submit(
                                task, fun, points[i], wanted, self.deadline, home
                            )
                        except Exception as error:
                            yield i, self._lost(error, alone)
                            continue
                        under_way[i] = future
                        future.add_done_callback(lambda f, i=i, done=done: done.put((i, f)))
                    if not under_way:
                        break
                    try:
                        i, future = done.get(timeout=patience)
                    except queue.Empty:
                        why = f"no worker gave an answer within {patience} s"
                        silent = Lost(why, int(alone), silent=True)
                        logger.warning("%s: all of them count as lost.", why)
                        self._trusted, self._tainted = None, True
                        self._discard()
                        for i in under_way:
                            yield i, silent
                        break
                    del under_way[i]
                    yield i, self._read(future, alone)
            finally:  # where nobody waits for them any more
                for future in under_way.values():
                    future.cancel()

    def _read(self, future: Future, alone: bool) -> Answer:
        try:
            return future.result()
        except PointTimeoutError:
            if isinstance(self._executor, Processes):
                self._executor.mend()
            else:
                self._tainted = True
            return TimedOut()
        except Exception as error:
            return self._lost(error, alone)

    def _lost(self, error: Exception, alone: bool) -> Lost:
        """A worker has died; the executor is tried before it is used again."""
        why = f"{type(error).__name__}: {error}"
        logger.info("a worker was lost (%s).", why)
        if not getattr(self._executor, "isolates", False):
            self._trusted = None
        # Dask has tried again so often already.
        again = getattr(error, "allowed_failures", 0)
        return Lost(why, 1 + again if alone else 0)

    # -- executors --------------------------------------------------------------------------------

    def _ready(self, fun: Callable) -> Any:
        """An executor that was tried with `fun`."""
        if self._executor is not None:
            error = None if self._trusted is fun else self._tried(fun)
            if error is None:
                return self._executor
            if self._make is None:
                why = f"the executor broke ({type(error).__name__}: {error})"
                raise _gone(f"{why}, and one that was given cannot be replaced") from error
            self._discard()
        if self._make is None:
            self._executor, attempts = self._given, 1
        else:
            attempts = ATTEMPTS
        error = None
        for _ in range(attempts):
            if self._make is not None:
                self._discard()
                self._executor = self._made()
            error = self._tried(fun)
            if error is None:
                return self._executor
        if isinstance(error, BrokenExecutor):
            why = (
                "the workers end before they evaluate anything. The objective must be importable "
                "from a module; a script that starts processes needs `if __name__ == '__main__':`"
            )
            raise _gone(f"{why} ({error})") from error
        raise _gone(f"the executor does not work ({type(error).__name__}: {error})") from error

    def _made(self) -> Any:
        assert self._make is not None
        try:
            executor = _checked(self._make())
        except Exception as error:
            raise _gone(f"the executor cannot be made: {error}") from error
        self.counts["made"] += 1
        return executor

    def _tried(self, fun: Callable) -> Exception | None:
        """Why `fun` does not arrive at a worker and back, or `None`."""
        patience = None if self.deadline is None else self.startup
        try:
            self._executor.submit(loads, fun).result(timeout=patience)
        except (TypeError, AttributeError, ImportError) as error:
            raise _cannot_travel(error) from error
        except Exception as error:
            if "ickl" in type(error).__name__:
                raise _cannot_travel(error) from error
            return error
        self._trusted = fun
        return None

    def _discard(self) -> None:
        """Let go of the executor; shut down one that was made here."""
        executor, self._executor = self._executor, None
        tainted, self._tainted, self._trusted = self._tainted, False, None
        if executor is None or self._make is None:
            return
        if tainted and hasattr(executor, "shutdown"):
            end(executor)
        elif hasattr(executor, "shutdown"):
            executor.shutdown(wait=True)


def _source(executor: Any) -> tuple[Callable[[], Any] | None, Any]:
    """What `executor` says: a callable that makes executors, or one that is there."""
    if executor is None:
        return None, _ThisProcess()
    if isinstance(executor, int) and not isinstance(executor, bool):
        if executor < 1:
            raise ValueError(f"executor is {executor}: give at least 1 process.")
        return lambda: Processes(executor), None
    if hasattr(executor, "submit") and not isinstance(executor, type):
        return None, _checked(executor)
    if callable(executor):
        return executor, None
    raise TypeError(
        f"executor is {executor!r}: it must have `submit(fn, *args)`, be a callable that makes "
        "such an executor, or be a number of processes."
    )


def _checked(executor: Any) -> Any:
    if not hasattr(executor, "submit"):
        raise TypeError(f"it is {executor!r}, which has no `submit(fn, *args)`.")
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            f"executor is {executor!r}, which forks this process; forks can deadlock with JAX. "
            "Give a number of processes instead, or `ProcessPoolExecutor(mp_context="
            "multiprocessing.get_context('spawn'))`."
        )
    return executor


def _gone(why: str) -> WorkersLostError:
    logger.error("workers are lost: %s.", why)
    return WorkersLostError(f"{why}.")


def _cannot_travel(error: Exception) -> TypeError:
    return TypeError(
        f"the objective cannot be sent to a worker ({type(error).__name__}: {error}): define it at "
        "the top level of a module, without lambdas and open files, or use threads."
    )


def _there(row: Row | None) -> Row:
    assert row is not None
    return row


__all__ = ["Workers"]
