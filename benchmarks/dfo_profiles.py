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

TOLERANCES = (1e-1, 1e-3, 1e-5)


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
