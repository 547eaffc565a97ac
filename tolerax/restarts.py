"""Runs that begin again with more particles, until the budget is spent."""

import time
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from tolerax.contracts import Problem, Solver, Work
from tolerax.driver import solve
from tolerax.solution import Run, Solution
from tolerax.status import Status
from tolerax.validation import check_integer

#: What another run would end with as well.
FINAL = (Status.stopped, Status.worker_lost, Status.non_finite_start, Status.unbounded)


def solve_with_restarts(
    problem: Problem,
    solver: Solver,
    x0: PyTree,
    *,
    restarts: int = 3,
    growth: int = 2,
    key: PRNGKeyArray | None = None,
    max_work: int | Mapping[str, int] | None = None,
    max_seconds: float | int | None = None,
    **options: Any,
) -> Solution:
    """Minimize by several runs of a stochastic solver, each with a larger population.

    What one ensemble agrees upon may be a local minimum. Every further run starts from `x0` again,
    with a key of its own and `growth` times as many particles (Auger and Hansen, *CEC* 2005): few
    suffice for easy problems, and hard ones get many. A run ends as in `solve`; the series ends
    with the last restart, or when the work or the time for all runs together is spent.

    - `restarts`: the most further runs. `growth`: 1 keeps the size.
    - `max_work`, `max_seconds`: as in `solve`, for all runs together.
    - `options`: as in `solve`, for each run; not `checkpoint`.

    **Returns:** the solution of the best run, with the work of all.

    >>> import jax.numpy as jnp, tolerax
    >>> rastrigin = lambda x: jnp.mean(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)
    >>> problem, few = tolerax.Objective(rastrigin), tolerax.CBO(particles=5)
    >>> once = tolerax.solve(problem, few, jnp.full(3, 3.0))
    >>> again = tolerax.solve_with_restarts(problem, few, jnp.full(3, 3.0), restarts=3)
    >>> bool(again.value < once.value), int(again.work.points) > int(once.work.points)
    (True, True)
    """
    for name, value, least in (("restarts", restarts, 0), ("growth", growth, 1)):
        check_integer(name, value, least)
    if isinstance(x0, Run):
        raise TypeError("x0 is the state of a run: give a point, from which every run starts.")
    if "checkpoint" in options:
        raise ValueError("checkpoint holds one run, not a series: leave it out, or use `solve`.")
    if restarts and growth > 1 and solver.larger(2) is solver:
        raise ValueError(
            f"growth is {growth}, but {type(solver).__name__} has no population: give growth=1, or "
            "leave restarts out."
        )
    if restarts and growth > 1 and getattr(solver, "ensemble", None) is not None:
        raise ValueError(
            f"ensemble is given, but growth is {growth}, and larger runs need more particles: give "
            "`spread` instead, or growth=1."
        )
    limits = {"units": max_work} if isinstance(max_work, int) else dict(max_work or {})
    key = jax.random.key(0) if key is None else key
    begin, best, spent = time.monotonic(), None, Work()
    for run in range(restarts + 1):
        used = {name: int(getattr(spent, name)) for name in limits}
        left = {name: limit - used[name] for name, limit in limits.items()}
        seconds = max_seconds
        if run and max_seconds is not None:
            seconds = max_seconds - (time.monotonic() - begin)
        if run and (min(left.values(), default=1) <= 0 or (seconds is not None and seconds <= 0)):
            break
        solution = solve(
            problem,
            solver.larger(growth**run) if run else solver,
            x0,
            key=key if run == 0 else jax.random.fold_in(key, run),
            max_work=left or None,
            max_seconds=seconds,
            **options,
        )
        spent = spent + solution.work
        feasible = float(jnp.asarray(solver.feasibility))
        best = solution if best is None or _better(solution, best, feasible) else best
        if any(bool(solution.status == status) for status in FINAL):
            break
    assert best is not None
    return eqx.tree_at(lambda s: s.work, best, spent)


def _better(one: Solution, other: Solution, feasible: float) -> bool:
    """Feasible before infeasible, then by the upper end of the value."""
    violations = [float(s.violation) for s in (one, other)]
    if max(violations) > feasible:
        return violations[0] < violations[1]
    return bool(jnp.nan_to_num(one.interval[1], nan=jnp.inf) < other.interval[1])
