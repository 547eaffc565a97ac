"""Constrained problems by values alone, beside COBYQA.

The problems are those of Hock and Schittkowski (*Test Examples for Nonlinear Programming Codes*,
1981) in sif2jax with constraints and at most 7 variables. Solved is a problem where, within
100 (n + 1) points, a point was returned that violates no constraint by more than 1e-6 and whose
value is within 1e-4 (relative, absolute below 1) of the lowest of all solvers' at such points.
"""

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

import tolerax
from benchmarks.cutest_library import library
from benchmarks.frame import Bar, Group, Measured, Settings

LARGEST, TOLERANCE, CLOSE = 7, 1e-6, 1e-4


class Case:
    """A problem on vectors; constraints, equalities first, between `lower` and `upper`."""

    def __init__(self, name: str, problem: Any):
        self.name = name
        x0, unravel = ravel_pytree(problem.y0)
        equal, above = (self._flat(part).size for part in problem.constraint(problem.y0))
        self.lower = np.zeros(equal + above)
        self.upper = np.concatenate([np.zeros(equal), np.full(above, np.inf)])
        self.low, self.high = np.full(x0.size, -np.inf), np.full(x0.size, np.inf)
        if problem.bounds is not None:
            sides = (np.asarray(ravel_pytree(side)[0], float) for side in problem.bounds)
            self.low, self.high = sides
        self.x0 = np.clip(np.asarray(x0, float), self.low, self.high)

        def both(x: Any) -> Any:
            parts = problem.constraint(unravel(x))
            value = jnp.asarray(problem.objective(unravel(x), problem.args), float).reshape(())
            return value, jnp.concatenate([self._flat(part) for part in parts])

        self.both = jax.jit(both)
        self.points: list[bytes] = []

    @staticmethod
    def _flat(part: Any) -> Any:
        return jnp.zeros(0) if part is None else ravel_pytree(part)[0]

    def fun(self, x: Any) -> float:
        """The objective; counts its points."""
        self.points.append(np.asarray(x, float).tobytes())
        return float(self.both(x)[0])

    def constraints(self, x: Any) -> np.ndarray:
        """The constraints."""
        return np.asarray(self.both(x)[1], float)

    def violation(self, x: Any) -> float:
        """The largest, also of the bounds."""
        c = self.constraints(x)
        out = [self.lower - c, c - self.upper, self.low - x, x - self.high]
        return max(0.0, *(np.max(part, initial=0.0) for part in out))


def cases(step: int) -> list[Case]:
    """Every `step`-th of the problems, in the order of their names."""
    known = library()
    every = {
        type(problem).__name__: problem
        for problem in (
            *known.constrained_minimisation_problems,
            *known.constrained_quadratic_problems,
        )
    }
    small = [
        name
        for name in sorted(every)
        if name.startswith("HS") and ravel_pytree(every[name].y0)[0].size <= LARGEST
    ]
    found = (Case(name, every[name]) for name in small[::step])
    # SciPy's COBYQA calls constraints without the variables that bounds fix.
    return [case for case in found if np.all(case.low < case.high)]


def ours(case: Case, budget: int, solver: tolerax.Solver | None = None) -> np.ndarray:
    """`ModelTrustRegion` at its defaults, or another solver."""
    solver = solver or tolerax.ModelTrustRegion()
    problem = tolerax.Objective(
        case.fun,
        host=True,
        on_error="fail",
        bounds=(jnp.asarray(case.low), jnp.asarray(case.high)),
        constraints=case.constraints,
        constraint_bounds=(case.lower, case.upper),
    )
    x0 = jnp.asarray(case.x0)
    options = {"max_steps": budget, "max_work": {"points": budget}}
    return np.asarray(tolerax.solve(problem, solver, x0, **options).x)


def cobyqa(case: Case, budget: int) -> np.ndarray:
    """SciPy's; its last radius is 1e-6 too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scipy.optimize.minimize(
            case.fun,
            case.x0,
            method="COBYQA",
            bounds=list(zip(case.low, case.high, strict=True)),
            constraints=scipy.optimize.NonlinearConstraint(
                case.constraints, case.lower, case.upper
            ),
            options={"maxfev": budget},
        ).x


METHODS: dict[str, Callable[[Case, int], np.ndarray]] = {
    "ours": ours,
    "CDSM": lambda case, budget: ours(case, budget, tolerax.CDSM()),
    "COBYQA": cobyqa,
}


def measure(settings: Settings) -> dict[str, Measured]:
    """Shares solved, and the points of those that both solved."""
    rows = []
    for index, case in enumerate(cases(10 if settings.quick else 1)):
        # A process may hold only so much compiled code.
        if index % 20 == 0:
            jax.clear_caches()
        row: dict[str, Any] = {"name": case.name, "n": case.x0.size}
        for name, method in METHODS.items():
            case.points.clear()
            x = method(case, 100 * (case.x0.size + 1))
            points = len(set(case.points))
            row[name] = {"value": case.fun(x), "violation": case.violation(x), "points": points}
        met = [row[name]["value"] for name in METHODS if row[name]["violation"] <= TOLERANCE]
        lowest = min(met, default=np.nan)
        for name in METHODS:
            close = row[name]["value"] <= lowest + CLOSE * max(1.0, abs(lowest))
            row[name]["solved"] = bool(close and row[name]["violation"] <= TOLERANCE)
        rows.append(row)
        told = ", ".join(
            f"{name} {row[name]['value']:.6g} {row[name]['violation']:.0e} {row[name]['points']}"
            for name in METHODS
        )
        settings.tell(f"   {case.name}: {told}")
    shares = {name: statistics.mean(row[name]["solved"] for row in rows) for name in METHODS}
    both = [row for row in rows if row["ours"]["solved"] and row["COBYQA"]["solved"]]
    ratio = statistics.median(row["ours"]["points"] / row["COBYQA"]["points"] for row in both)
    settings.tell(f"   solved {shares}, points beside COBYQA {ratio:.2f}")
    gain = shares["ours"] - shares["COBYQA"]
    return {
        "constrained_vs_cobyqa": Measured([gain], gain, {"shares": shares, "rows": rows}),
        "constrained_points_ratio": Measured([ratio], ratio, {}),
    }


GROUP = Group(
    "constrained",
    (
        Bar("constrained_vs_cobyqa", ">=", 0.0, "share of constrained problems solved - COBYQA's"),
        Bar("constrained_points_ratio", "<=", 1.5, "points / COBYQA's, median, solved by both"),
    ),
    measure,
)
