"""Evaluations on smooth functions beside SciPy's L-BFGS-B with exact gradients.

The count is of evaluations of the function, with or without a gradient, seen from inside it: what a
solver does to reach `f - f* <= 1e-8 (f0 - f*)`, and what it spends until it stops by itself.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.smooth_functions import Point, Smooth, Value, functions

REDUCTION = 1e-8
MAX_EVALUATIONS = 5_000

# Takes a function, a start and whether to go to the very end; returns the last point.
Minimizer = Callable[[Callable[[Point], Value], np.ndarray, bool], np.ndarray]


class Counted:
    """A function that remembers every value it has had, also inside compiled loops."""

    def __init__(self, fun: Callable[[Point], Value]):
        self.fun = fun
        self.values: list[float] = []

    def __call__(self, x: Point) -> Value:
        value = self.fun(x)
        jax.debug.callback(lambda v: self.values.append(float(v)), value)
        return value

    def count(self) -> int:
        """Evaluations so far."""
        jax.effects_barrier()
        return len(self.values)

    def until(self, target: float) -> int | None:
        """How many evaluations it took to get to the target or below; `None` if never."""
        jax.effects_barrier()
        return next((i + 1 for i, value in enumerate(self.values) if value <= target), None)


@dataclass(frozen=True)
class Effort:
    """Evaluations to the target, and until the solver with default tolerances stopped."""

    to_target: int | None
    to_stop: int
    gap_at_stop: float


def lbfgsb(fun: Callable[[Point], Value], x0: np.ndarray, tight: bool) -> np.ndarray:
    """SciPy's L-BFGS-B, m = 10, exact gradients; `tight` switches its stopping tests off."""
    value_and_gradient = jax.jit(jax.value_and_grad(fun))

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(x)
        return float(value), np.asarray(gradient)

    options = {"maxcor": 10, "maxfun": MAX_EVALUATIONS, "maxiter": MAX_EVALUATIONS}
    if tight:
        options |= {"ftol": 0.0, "gtol": 1e-14}
    return scipy.optimize.minimize(evaluate, x0, jac=True, method="L-BFGS-B", options=options).x


def line_search(fun: Callable[[Point], Value], x0: np.ndarray, tight: bool) -> np.ndarray:
    """This library's default on plain functions."""
    import tolerax

    options = {"maxiter": MAX_EVALUATIONS, "maxfun": MAX_EVALUATIONS}
    tol = 1e-14 if tight else None
    return np.asarray(tolerax.minimize(fun, x0, method="line-search", tol=tol, options=options).x)


def effort(minimizer: Minimizer, problem: Smooth, own_stop: bool = True) -> Effort:
    """What a minimizer spends on one function; without `own_stop` one run serves both counts."""
    start = float(problem.fun(jnp.asarray(problem.x0)))
    drop = start - problem.minimum
    tight = default = Counted(problem.fun)
    x = minimizer(tight, problem.x0, True)
    if own_stop:
        default = Counted(problem.fun)
        x = minimizer(default, problem.x0, False)
    return Effort(
        to_target=tight.until(problem.minimum + REDUCTION * drop),
        to_stop=default.count(),
        gap_at_stop=(float(problem.fun(jnp.asarray(x))) - problem.minimum) / drop,
    )


def compare(ours: Minimizer, peer: Minimizer, settings: Settings) -> dict[str, Measured]:
    """Ratio of evaluations over all functions, in a quick run over every third. A function that
    we do not solve counts as infinitely dear; where the peer fails, all it spent is its cost."""
    ratios, stops, unsolved, rows = [], [], [], {}
    for problem in functions()[:: 3 if settings.quick else 1]:
        mine, other = (effort(one, problem, not settings.quick) for one in (ours, peer))
        reference = other.to_stop if other.to_target is None else other.to_target
        ratio = float("inf") if mine.to_target is None else mine.to_target / reference
        ratios.append(ratio)
        stops.append(mine.to_stop / other.to_stop)
        if mine.to_target is None:
            unsolved.append(problem.name)
        rows[problem.name] = {"n": problem.n, "ours": vars(mine), "peer": vars(other)}
        settings.tell(
            f"   {problem.name:24s} n={problem.n:<5d} evaluations {mine.to_target} / "
            f"{other.to_target}, to stop {mine.to_stop} / {other.to_stop}, "
            f"gap {mine.gap_at_stop:.0e} / {other.gap_at_stop:.0e}"
        )
    return {
        "smooth_vs_lbfgsb": Measured(
            ratios, detail={"rows": rows, "median_to_stop": statistics.median(stops)}
        ),
        "smooth_unsolved": Measured([len(unsolved)], detail={"names": unsolved}),
    }


GROUP = Group(
    "smooth",
    (
        Bar("smooth_vs_lbfgsb", "<=", 1.1, "evaluations / SciPy L-BFGS-B, 20 smooth functions"),
        Bar("smooth_unsolved", "<=", 0, "smooth functions of these 20 that we did not solve"),
    ),
    lambda settings: compare(line_search, lbfgsb, settings),
)
