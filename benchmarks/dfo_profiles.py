"""Shares of BBOB solved within 100 (n + 1) points, beside the peers."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import tolerax
from benchmarks import bbob, dfo_peers
from benchmarks.frame import Bar, Group, Measured, Settings

TOLERANCES = (1e-1, 1e-3, 1e-5)
VALUE = jax.jit(bbob.value)


def start(kind: int, number: int, n: int) -> np.ndarray:
    """Where all methods start: uniform in the box."""
    return np.random.default_rng((kind, number, n)).uniform(-5, 5, n)


@functools.partial(eqx.filter_jit)
def _trace(p: bbob.Instance, solver: Any, x0: Array, key: Array, budget: int) -> tuple:
    bounds = (jnp.full_like(x0, -dfo_peers.BOUND), jnp.full_like(x0, dfo_peers.BOUND))
    problem = tolerax.Objective(eqx.Partial(bbob.value, p), bounds=bounds)
    solution = tolerax.solve(
        problem, solver, x0, key=key, max_steps=budget, max_work={"points": budget}
    )
    history = solution.history
    return history.work.points, history.best_value, solution.steps


def lowest(p: bbob.Instance, solver: tolerax.Solver, x0: np.ndarray, seed: int) -> np.ndarray:
    """How far above the minimum the best of the first 1, 2, ... points is."""
    budget = 100 * (x0.size + 1)
    key = jax.random.key(seed)
    points, best, steps = _trace(p, solver, jnp.asarray(x0), key, budget)
    steps = int(steps)
    points, best = np.asarray(points)[:steps], np.asarray(best)[:steps]
    # A batch counts once it is complete.
    index = np.searchsorted(points, np.arange(1, budget + 1), side="right") - 1
    found = np.where(index < 0, np.inf, best[np.maximum(index, 0)])
    return found - float(p.f_opt)


def solved(above: np.ndarray, first: float) -> list[bool]:
    """Whether the last value is within each of `TOLERANCES` of the way from the start."""
    return [bool(above[-1] <= tolerance * first) for tolerance in TOLERANCES]


OURS = "ModelTrustRegion(explore=True)"


def measure(settings: Settings) -> dict[str, Measured]:
    """All functions on instances 1 to 5, in 5 and 10 dimensions. Tuned on instances 6 to 9."""
    instances, sizes = ((1,), (5,)) if settings.quick else ((1, 2, 3, 4, 5), (5, 10))
    shares: dict[str, dict[str, list[float]]] = {}
    gaps, tight = [], []
    for n in sizes:
        hits: dict[str, list[list[bool]]] = {}
        for number in instances:
            for kind in bbob.FUNCTIONS:
                for name, found in solved_by_all(kind, number, n).items():
                    hits.setdefault(name, []).append(found)
        mean = {name: np.mean(rows, axis=0).tolist() for name, rows in hits.items()}
        shares[f"n={n}"] = mean
        for name, row in mean.items():
            settings.tell(f"   n {n} {name}: " + " ".join(f"{share:.3f}" for share in row))
        best = np.max([row for name, row in mean.items() if name != OURS], axis=0)
        ahead = np.asarray(mean[OURS]) - best
        gaps += ahead[:2].tolist()
        tight.append(float(ahead[2]))
    return {
        "bbob_profile": Measured(gaps, min(gaps), {"shares": shares}),
        "bbob_profile_tight": Measured(tight, min(tight)),
    }


def solved_by_all(kind: int, number: int, n: int) -> dict[str, list[bool]]:
    """Which tolerances each method reached on one function."""
    p, x0 = bbob.instance(kind, number, n), start(kind, number, n)
    first = float(VALUE(p, jnp.asarray(x0))) - float(p.f_opt)
    solver = tolerax.ModelTrustRegion(explore=True)
    found = {OURS: solved(lowest(p, solver, x0, number), first)}
    for name in dfo_peers.PEERS:
        values = dfo_peers.values_of(name, lambda x: float(VALUE(p, x)), x0, 100 * (n + 1), number)
        best = np.minimum.accumulate(np.where(np.isnan(values), np.inf, values))
        found[name] = solved(best - float(p.f_opt), first)
    return found


GROUP = Group(
    "bbob",
    (
        Bar(
            "bbob_profile", ">=", 0.0, "share solved at 1e-1 and 1e-3 minus the best peer's, least"
        ),
        Bar("bbob_profile_tight", ">=", -0.05, "the same at 1e-5"),
    ),
    measure,
)
