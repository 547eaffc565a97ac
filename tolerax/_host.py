"""The loop driven from the host: slices of the compiled loop, or one answer at a time."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tolerax import _loop
from tolerax._steps import RaisedError, Steps
from tolerax.checkpoint import Checkpoint, fingerprint
from tolerax.contracts import Problem, Solver
from tolerax.errors import EvaluationError, WorkersLostError
from tolerax.progress import Progress, Silent
from tolerax.solution import Run, Solution, Step
from tolerax.status import Status

SLICE_SECONDS = 0.2


def _while_running(error: Exception) -> bool:
    """Whether this was raised by compiled code that ran, for instance in a callback to Python, and
    not while it was made."""
    kinds = jax.errors.JaxRuntimeError, eqx.EquinoxRuntimeError
    # The CPU client of jaxlib makes a ValueError of some.
    return isinstance(error, kinds) or str(error).startswith("INTERNAL:")


class Slices:
    """A compiled run in slices of about `SLICE_SECONDS`, or, with a callback, in single steps."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        run: Run,
        limits: _loop.Limits,
        callback: Callable[[Step], Any] | None,
        watched: bool,
    ):
        self.problem, self.solver, self.limits, self.run = problem, solver, limits, run
        self.callback = callback
        self.length = 1 if watched else None

    @property
    def going(self) -> bool:
        """Whether the run goes on."""
        spent = _loop.spent_compiled(self.run.work, self.limits)
        return bool((self.run.status == Status.running) & ~spent)

    @property
    def number(self) -> int:
        """How many answers there have been."""
        return int(self.run.step)

    @property
    def scalars(self) -> dict[str, float]:
        """What is shown of the run."""
        return {name: float(value) for name, value in _loop.scalars(self.run).items()}

    def advance(self, last: int) -> None:
        """A slice, at most to step `last`."""
        if self.callback is not None:
            try:
                done = _loop.one(self.problem, self.solver, self.run, self.limits)
                done = jax.block_until_ready(done)
            except Exception as error:
                if _while_running(error):
                    raise RaisedError from error
                raise
            self.run, query, evaluation = done
            self.callback(Step(query, evaluation, self.run))
            return
        tick = time.perf_counter()
        until = last if self.length is None else min(self.number + self.length, last)
        limits = self.limits
        try:
            run = _loop.advance(self.problem, self.solver, self.run, jnp.asarray(until), limits)
            self.run = jax.block_until_ready(run)
        except Exception as error:
            if not _while_running(error):
                raise
            if until == self.number + 1:
                raise RaisedError from error
            # Once more in smaller slices, to have the best point before it raised.
            self.length = 1
            return
        if self.length is not None:
            # The first slice takes longer, since it compiles.
            took = time.perf_counter() - tick
            self.length = 2 * self.length if took < SLICE_SECONDS else max(1, self.length // 2)


class Host:
    """Drives a run and, between its steps or slices, reports, saves and checks limits."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        limits: _loop.Limits,
        callback: Callable[[Step], Any] | None,
        meter: Progress,
        checkpoint: Checkpoint | None,
        finish: Callable[[Run], Solution],
        start: Any,
    ):
        self.problem, self.solver, self.limits = problem, solver, limits
        self.callback, self.meter, self.checkpoint = callback, meter, checkpoint
        self.finish = finish
        # What a checkpoint must have been made by to be continued here.
        self.identity = (
            {
                "solver": type(solver).__name__,
                "solver_options": fingerprint(solver),
                "problem": fingerprint(problem),
                "x0_and_key": fingerprint(start),
            }
            if checkpoint is not None
            else {}
        )
        self.saved_at = time.perf_counter()
        self.saved_step = 0

    def drive(self, run: Run, max_steps: int, max_seconds: float | None) -> Run:
        """Run until the status is final or a limit is reached."""
        last = int(run.step) + max_steps
        if self.checkpoint is not None and self.checkpoint.exists():
            size = self.checkpoint.manifest().get("history")
            template = run if size is None else _loop.with_history(run, *size)
            run, _ = self.checkpoint.load(template, expect=self.identity)
            run = _loop.extended(_loop.resumable(run), last - int(run.step))
        began = time.perf_counter()
        deadline = None if max_seconds is None else began + max_seconds
        self.saved_step = int(run.step)
        self.meter.start(last, type(self.solver).__name__)
        try:
            course = self._course(run, deadline is not None)
            while course.going and course.number < last:
                try:
                    course.advance(last)
                except StopIteration:
                    return self._end(course.run, Status.stopped)
                except WorkersLostError:
                    return self._end(course.run, Status.worker_lost)
                except RaisedError as raised:
                    raise self._stopped_by(raised.__cause__, course.run) from raised.__cause__
                except BaseException:  # Ctrl-C, or a callback that raises
                    if course.number > self.saved_step:
                        self._save(course.run)
                    raise
                self._report(course)
                if self._due(course.number):
                    self._save(course.run)
                # Compiling may take all the time: there is one answer at least.
                late = deadline is not None and time.perf_counter() >= deadline
                if late and course.going:
                    return self._end(course.run, Status.time)
            return self._end(course.run, Status.budget)
        finally:
            self.meter.close("")
            self.problem.close()

    def _course(self, run: Run, watched: bool) -> Steps | Slices:
        if self.problem.host:
            return Steps(self.problem, self.solver, run, self.limits, self.callback)
        watched = watched or self.checkpoint is not None or not isinstance(self.meter, Silent)
        return Slices(self.problem, self.solver, run, self.limits, self.callback, watched)

    def _stopped_by(self, error: BaseException | None, run: Run) -> EvaluationError:
        self._save(run)
        return EvaluationError(
            f"the objective raised {type(error).__name__}: {error} (the best point so far "
            "is in the attribute `solution` of this error)",
            self.finish(run),
        )

    def _report(self, course: Steps | Slices) -> None:
        if not isinstance(self.meter, Silent):
            self.meter.update(course.number, **course.scalars)

    def _due(self, step: int) -> bool:
        saver = self.checkpoint
        if saver is None:
            return False
        due = time.perf_counter() - self.saved_at >= saver.every_seconds
        return due or (
            saver.every_steps is not None and step - self.saved_step >= saver.every_steps
        )

    def _save(self, run: Run) -> None:
        if self.checkpoint is None:
            return
        step = int(run.step)
        history = run.history.value.shape[0], run.history.stride
        counts = {"step": step, "work": run.work.as_dict(), "history": history}
        self.checkpoint.save(run, self.identity | counts)
        self.saved_at, self.saved_step = time.perf_counter(), step

    def _end(self, run: Run, status: Any) -> Run:
        running = run.status == Status.running
        run = dataclasses.replace(run, status=Status.where(running, status, run.status))
        if not isinstance(self.meter, Silent):
            shown = {name: float(value) for name, value in _loop.scalars(run).items()}
            self.meter.update(int(run.step), **shown)
        self._save(run)
        return run
