"""`solve`: one loop, run compiled or from the host.

The compiled loop alternates ask, evaluate and tell in a `lax.while_loop`. From the host the same
loop runs in slices, between which progress is reported, limits are checked and checkpoints are
saved; problems that are Python code are evaluated between compiled calls, one a step.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from tolerax import _loop
from tolerax._host import Host
from tolerax._live import Begun, close_from_compiled
from tolerax.checkpoint import Checkpoint
from tolerax.contracts import Problem, Solver
from tolerax.errors import SolveError
from tolerax.progress import Silent, resolve
from tolerax.solution import Run, Solution, Step
from tolerax.status import Status
from tolerax.validation import check_bounds, check_integer, check_start, is_concrete, traced_floats


def solve(
    problem: Problem,
    solver: Solver,
    x0: PyTree,
    *,
    key: PRNGKeyArray | None = None,
    max_steps: int = 1000,
    max_work: int | Mapping[str, int] | None = None,
    max_seconds: float | int | None = None,
    callback: Callable[[Step], Any] | None = None,
    progress: Any = None,
    checkpoint: Checkpoint | str | None = None,
    executor: Any = None,
    throw: bool = False,
) -> Solution:
    """Minimize a problem with a solver.

    **Arguments:**

    - `problem`: answers queries, for instance `Objective(fun)` or `Bilevel(upper, lower, y0)`.
    - `solver`: for instance `InexactLineSearch()`.
    - `x0`: the start, a pytree of float arrays; or the `state` of an earlier `Solution`, which
      continues that run.
    - `key`: random key of a stochastic solver (default `jax.random.key(0)`).
    - `max_steps`: the most answers that the solver is told in this call.
    - `max_work`: the most work in this run: an integer limits `Work.units`, a mapping limits kinds,
      for instance `{"lower_gradients": 1000}`. Checked between answers.
    - `max_seconds`: wall time; checked between answers, an evaluation is never interrupted.
    - `callback`: called as `callback(step)` after each answer; raising `StopIteration` stops.
    - `progress`: `True`, `"bar"`, `"log"`, or an object of `tolerax.progress`.
    - `checkpoint`: a path or `Checkpoint`: the run is saved there now and then, and continues from
      there when the file exists already. A file of another problem, solver, x0 or key is refused.
    - `executor`: where points are evaluated by Python code: a number of processes, an executor
      (`submit(fn, *args)`), a callable that makes one, or [`Workers`][] with further options.
    - `throw`: raise `SolveError` (with the solution attached) unless the status is a success.

    Under `jit` and `vmap` the whole run is compiled; callbacks, checkpoints and time limits then
    raise, `progress` is throttled. A traced x0 outside its bounds, which raises elsewhere, is moved
    to the nearest point within them.

    **Returns:** a `Solution`. Failures are statuses, nothing is raised for them unless `throw`.

    >>> import jax.numpy as jnp, tolerax
    >>> problem = tolerax.Objective(lambda x: jnp.sum((x - 1.0) ** 2))
    >>> solution = tolerax.solve(problem, tolerax.InexactLineSearch(), jnp.zeros(3))
    >>> solution.x, bool(solution.success)
    (Array([1., 1., 1.], dtype=float64), True)
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem is {type(problem).__name__}, not a Problem: wrap a function as "
            "`tolerax.Objective(fun)`."
        )
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {solver!r}, not a Solver: try `tolerax.InexactLineSearch()`.")
    max_steps = check_integer("max_steps", max_steps)
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds is {max_seconds!r}: give a positive number, or None.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}: give a function of a step, or None.")
    if not isinstance(checkpoint, str | os.PathLike | Checkpoint | None):
        raise TypeError(f"checkpoint is {checkpoint!r}: give a path, a Checkpoint, or None.")
    if key is not None and not _is_key(key):
        raise TypeError(f"key is {key!r}: make one with `jax.random.key(0)`.")
    if problem.bounds is not None and not solver.honours_bounds:
        raise ValueError(
            f"{type(solver).__name__} does not honour bounds: use a solver that does, or remove "
            "the bounds of the problem."
        )
    if problem.constraint_bounds is not None and not solver.honours_constraints:
        raise ValueError(
            f"{type(solver).__name__} does not look at constraints: use a solver that does, for "
            "instance `CBO`, or remove the constraints of the problem."
        )
    meter = resolve(progress)
    limits = _limits(max_work)
    problem = problem.on(executor)
    if not isinstance(x0, Run):
        x0 = check_start(x0)
        solver.check(x0)
    solver = traced_floats(solver.by_gradients() if problem.host else solver)
    if isinstance(x0, Run):
        run = _loop.extended(_loop.resumable(x0), max_steps)
    else:
        bounds = check_bounds(problem.bounds, x0)
        key = jax.random.key(0) if key is None else key
        run = _loop.begin(problem.outline(), solver, x0, bounds, key, max_steps)
    traced = not is_concrete(eqx.filter((run, problem, solver), eqx.is_array))
    finish = functools.partial(_finish, problem)
    if traced:
        _refuse_host_features(problem, callback, checkpoint, max_seconds)
        live = None
        if not isinstance(meter, Silent):
            live = Begun(meter, max_steps, type(solver).__name__)
        run = _loop.advance(problem, solver, run, run.step + max_steps, limits, live)
        if live is not None:
            close_from_compiled(live, run.step, _loop.scalars(run))
    else:
        if isinstance(checkpoint, str | os.PathLike):
            checkpoint = Checkpoint(checkpoint)
        start = (x0, key) if checkpoint is not None else None
        host = Host(problem, solver, limits, callback, meter, checkpoint, finish, start)
        run = host.drive(run, max_steps, max_seconds)
    solution = finish(run)
    if throw and traced:
        solution = eqx.error_if(solution, ~solution.success, "solve did not converge.")
    elif throw and not bool(solution.success):
        raise SolveError(solution.message, solution)
    return solution


def _limits(max_work: int | Mapping[str, int] | None) -> _loop.Limits:
    """`max_work` as a limit of each kind; the names are those of `Work`."""
    if not isinstance(max_work, Mapping | None):
        max_work = {"units": max_work}
    limits = dict(max_work or {})
    for name, limit in limits.items():
        if name not in _loop.KINDS:
            known = ", ".join(_loop.KINDS)
            raise ValueError(f"max_work has the key {name!r}: use one of {known}.")
        limits[name] = check_integer(f"max_work[{name!r}]", limit)
    none = np.iinfo(jnp.result_type(int)).max
    return jnp.asarray([limits.get(name, none) for name in _loop.KINDS])


def _is_key(key: Any) -> bool:
    dtype = getattr(key, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and key.ndim == 1)
    )


def _refuse_host_features(
    problem: Problem, callback: Any, checkpoint: Any, max_seconds: Any
) -> None:
    given = {"callback": callback, "checkpoint": checkpoint, "max_seconds": max_seconds}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} needs the host, but solve runs inside jit, vmap or grad: call solve "
                f"outside, or leave {name} out."
            )
    if problem.host:
        raise ValueError("a problem evaluated by Python code cannot run inside jit or vmap.")


def _finish(problem: Problem, run: Run) -> Solution:
    """The solution of a run that has been driven as far as its limits allow."""
    status = Status.where(run.status == Status.running, Status.budget, run.status)
    nothing_usable = (run.best.value == jnp.inf) & (run.failures > 0)
    has_cause = jnp.array(False)
    for cause in (Status.non_finite_start, Status.stopped, Status.worker_lost, Status.time):
        has_cause = has_cause | (status == cause)
    status = Status.where(nothing_usable & ~has_cause, Status.all_failed, status)
    run = dataclasses.replace(run, status=status)
    best = run.best
    return Solution(
        best.x,
        best.value,
        best.value_error,
        best.gradient,
        best.gradient_norm,
        best.gradient_error,
        best.violation,
        status,
        run.work,
        run.history,
        run,
        best.carry,
        problem.provenance,
    )
