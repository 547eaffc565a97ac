"""The loop driven from the host: slices of the compiled loop, or one answer at a time."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tolerax import _loop
from tolerax.checkpoint import Checkpoint, fingerprint
from tolerax.contracts import Problem, Solver
from tolerax.errors import EvaluationError, WorkersLostError
from tolerax.progress import Progress, Silent
from tolerax.solution import Run, Solution, Step
from tolerax.status import Status

SLICE_SECONDS = 0.2


class Host:
    """Runs the loop and, between its steps or slices, reports, saves and checks limits."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        limits: dict[str, Any],
        callback: Callable[[Step], Any] | None,
        meter: Progress,
        checkpoint: Checkpoint | None,
        finish: Callable[[Run], Solution],
    ):
        self.problem, self.solver, self.limits = problem, solver, limits
        self.callback, self.meter, self.checkpoint = callback, meter, checkpoint
        self.finish = finish
        self.saved_at = time.perf_counter()
        self.saved_step = 0

    def drive(self, run: Run, max_steps: int, max_seconds: float | None) -> Run:
        """Run until the status is final or a limit is reached."""
        last = int(run.step) + max_steps
        if self.checkpoint is not None and self.checkpoint.exists():
            run, _ = self.checkpoint.load(run, expect=self._identity())
            run = _loop.resumable(run)
        began = time.perf_counter()
        deadline = None if max_seconds is None else began + max_seconds
        single = self.callback is not None or self.problem.host
        watched = deadline is not None or self.checkpoint is not None
        watched = watched or not isinstance(self.meter, Silent)
        length = 1 if watched else last
        self.saved_step = int(run.step)
        self.meter.start(last, type(self.solver).__name__)
        try:
            while self._going(run, last):
                if deadline is not None and time.perf_counter() >= deadline:
                    return self._end(run, Status.time)
                tick = time.perf_counter()
                try:
                    run = self._one(run) if single else self._slice(run, length, last)
                except StopIteration:
                    return self._end(self.latest, Status.stopped)
                except WorkersLostError:
                    return self._end(self.latest, Status.worker_lost)
                if not single and watched:
                    # A slice takes about SLICE_SECONDS once its first call has compiled.
                    took = time.perf_counter() - tick
                    length = 2 * length if took < SLICE_SECONDS else max(1, length // 2)
                self._report(run)
                self._save(run)
            return self._end(run, Status.budget)
        finally:
            self.meter.close("")
            self.problem.close()

    def _going(self, run: Run, last: int) -> bool:
        running = bool(run.status == Status.running) and int(run.step) < last
        return running and not bool(_loop.spent(run, self.limits))

    def _slice(self, run: Run, length: int, last: int) -> Run:
        until = jnp.asarray(min(int(run.step) + length, last))
        run = _loop.advance(self.problem, self.solver, run, until, self.limits)
        return jax.block_until_ready(run)

    def _one(self, run: Run) -> Run:
        self.latest = run
        if self.problem.host:
            query = _loop.ask_compiled(self.solver, run, self.limits)
            try:
                evaluation = _loop.evaluated(self.problem, query)
            except (StopIteration, WorkersLostError):
                raise
            except Exception as error:
                self._save(run, force=True)
                raise EvaluationError(
                    f"the objective raised {type(error).__name__}: {error} (the best point so far "
                    "is in the attribute `solution` of this error)",
                    self.finish(run),
                ) from error
            new = _loop.tell_compiled(self.solver, run, query, evaluation)
        else:
            new, query, evaluation = _loop.one(self.problem, self.solver, run, self.limits)
        self.latest = new
        if self.callback is not None:
            self.callback(Step(query, evaluation, new))
        return new

    def _report(self, run: Run) -> None:
        if not isinstance(self.meter, Silent):
            scalars = {name: float(value) for name, value in _loop.scalars(run).items()}
            self.meter.update(int(run.step), **scalars)

    def _save(self, run: Run, force: bool = False) -> None:
        saver = self.checkpoint
        if saver is None:
            return
        step, now = int(run.step), time.perf_counter()
        due = now - self.saved_at >= saver.every_seconds
        if saver.every_steps is not None:
            due = due or step - self.saved_step >= saver.every_steps
        if due or force:
            counts = {"step": step, "work": run.work.as_dict()}
            saver.save(run, self._identity() | counts)
            self.saved_at, self.saved_step = now, step

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must have been made by to be continued here."""
        return {
            "solver": type(self.solver).__name__,
            "solver_options": fingerprint(self.solver),
            "problem": fingerprint(self.problem),
        }

    def _end(self, run: Run, status: Any) -> Run:
        running = run.status == Status.running
        run = dataclasses.replace(run, status=Status.where(running, status, run.status))
        self._report(run)
        self._save(run, force=True)
        return run
