"""Other methods at an equal number of evaluations, on the functions and from the box of our runs.

pycma with restarts doubles the population whenever it stops; with a population of 500 it runs once.
SciPy's differential evolution starts from a population drawn in the same box and is allowed to
leave it as far as the shifts reach. cbx runs with anisotropic noise, sigma sqrt(dt) = 1 and
alpha = 1e5: its default of isotropic noise with sigma = 5.1 diverges.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import scipy.optimize

from benchmarks.cbo_functions import BOX, Draw, Moved
from benchmarks.cbo_runs import WITHIN, Found, described, keys_of
from benchmarks.frame import Settings

# Takes a NumPy function of points (..., d), the dimension, evaluations and a seed: the best point.
Peer = Callable[[Moved, int, int, int], np.ndarray]
EACH = 2  # runs of a peer for each seed
CMA_SIGMA = 2.0  # a third of the width of the box


class Counted:
    """A function of batches that keeps its best point and counts what it was asked."""

    def __init__(self, fun: Moved, budget: int):
        self.fun, self.left = fun, budget
        self.best, self.x = np.inf, np.empty(0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        values = self.fun(x)
        # What lies beyond the budget is answered but not counted as found.
        seen = values.reshape(-1)[: max(self.left, 0)]
        self.left -= values.size
        if seen.size and seen.min() < self.best:
            self.best = float(seen.min())
            self.x = x.reshape(-1, x.shape[-1])[int(seen.argmin())].copy()
        return values


def cma_once(counted: Counted, d: int, seed: int, population: int | None) -> int:
    """One run of pycma until it stops or the budget is spent; returns its population."""
    import cma

    x0 = np.random.default_rng(seed).uniform(-BOX, BOX, d)
    options: dict[str, Any] = {"verbose": -9, "seed": seed + 1}
    if population is not None:
        options["popsize"] = population
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises on settings
        strategy = cma.CMAEvolutionStrategy(x0, CMA_SIGMA, options)
        while not strategy.stop() and counted.left > 0:
            points = strategy.ask()
            strategy.tell(points, counted(np.asarray(points)).tolist())
    return strategy.popsize


def cma_restarts(fun: Moved, d: int, budget: int, seed: int) -> np.ndarray:
    counted, population, trial = Counted(fun, budget), None, 0
    while counted.left > 0:
        population = 2 * cma_once(counted, d, 1000 * seed + trial, population)
        trial += 1
    return counted.x


def cma_large(fun: Moved, d: int, budget: int, seed: int) -> np.ndarray:
    counted = Counted(fun, budget)
    cma_once(counted, d, 1000 * seed, 500)
    return counted.x


def differential_evolution(fun: Moved, d: int, budget: int, seed: int) -> np.ndarray:
    counted = Counted(fun, budget)
    rng = np.random.default_rng(seed)
    population = 15 * d
    scipy.optimize.differential_evolution(
        lambda x: counted(x.T),
        [(-BOX, BOX)] * d,
        init=rng.uniform(-BOX, BOX, (population, d)),  # pyright: ignore[reportArgumentType]
        maxiter=budget // population - 1,
        tol=0.0,
        polish=False,
        vectorized=True,
        updating="deferred",
        rng=rng,
    )
    return counted.x


def cbx_run(
    fun: Callable, x: np.ndarray, steps: int, *, s: float, alpha: float, seed: int, dt: float = 0.01
) -> Any:
    """The published package with anisotropic noise, nothing tracked and nothing scheduled; x of
    shape (runs, particles, d)."""
    from cbx.dynamics import CBO
    from cbx.scheduler import scheduler

    dynamic = CBO(
        fun,
        f_dim="3D",
        check_f_dims=False,
        x=x,
        noise="anisotropic",
        dt=dt,
        sigma=s / np.sqrt(dt),
        alpha=alpha,
        max_it=steps,
        track_args={"names": []},
        verbosity=0,
        seed=seed,
    )
    dynamic.optimize(sched=scheduler([]))  # pyright: ignore[reportArgumentType]
    return dynamic


def cbx(fun: Moved, d: int, budget: int, seed: int) -> np.ndarray:
    counted, particles = Counted(fun, budget), 100
    x = np.random.default_rng(seed).uniform(-BOX, BOX, (1, particles, d))
    cbx_run(counted, x, budget // particles, s=1.0, alpha=1e5, seed=seed)
    return counted.x


PEERS: Mapping[str, Peer] = {
    "pycma, restarts": cma_restarts,
    "pycma, population 500": cma_large,
    "SciPy differential evolution": differential_evolution,
    "cbx": cbx,
}


def beside(draw: Draw, d: int, budget: int, settings: Settings) -> dict[str, Any]:
    """What the peers find in two runs for each seed, on the very functions of our first runs."""
    if settings.quick:
        return {}
    rows = {}
    for name, peer in PEERS.items():
        found = Found()
        for seed, which in itertools.product(settings.seeds, range(EACH)):
            fun = draw(jax.random.split(keys_of(seed, EACH)[which], 3)[0], d).numpy()
            x = peer(fun, d, budget, EACH * seed + which)
            found.add(
                {
                    "error": [np.max(np.abs(x - fun.shift))],
                    "value": [float(fun(x))],
                    "evaluations": [budget],
                    "agreed": [False],
                }
            )
        rows[name] = described(found)
        rate, runs = rows[name]["rate"], rows[name]["runs"]
        settings.tell(f"      {name:26s} {rate:.2f} of {runs} runs within {WITHIN}")
    return rows
