"""Many runs at once, each from a key of its own, and the share of them that found the minimum."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

import tolerax
from benchmarks.cbo_functions import BOX, Draw
from benchmarks.frame import Measured, Settings
from tolerax.status import Status

WITHIN = 0.25  # the largest error of a coordinate at a success
KEYS_PER_SEED = 20  # the five seeds of a full run are the keys 0 to 99


def unchanged(fun: Any) -> Any:
    """The function itself."""
    return fun


@dataclass(frozen=True)
class Case:
    """Runs of one solver on functions drawn by `draw`, from particles uniform in the start box (or,
    without `ensemble`, as the solver places them around x0 = 0).

    `each` and `each_quick` are the runs per seed in a full and in a quick benchmark.
    """

    name: str
    draw: Draw
    d: int
    solver: tolerax.CBO
    steps: int
    each: int = KEYS_PER_SEED
    each_quick: int = KEYS_PER_SEED
    ensemble: bool = True
    below: float = math.inf
    wrap: Callable[[Any], Any] = unchanged


@dataclass
class Found:
    """What runs found: one entry each."""

    error: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)

    def add(self, more: dict[str, Any]) -> None:
        for name, entries in more.items():
            getattr(self, name).extend(np.asarray(entries).tolist())

    def successes(self, below: float = math.inf) -> list[bool]:
        return [e < WITHIN and v < below for e, v in zip(self.error, self.value, strict=True)]


def keys_of(seed: int, count: int) -> PRNGKeyArray:
    """The keys that a seed stands for."""
    first = KEYS_PER_SEED * seed
    return jax.vmap(jax.random.key)(jnp.arange(first, first + count))


def start(key: PRNGKeyArray, particles: int, d: int) -> jax.Array:
    """Particles uniform in the start box."""
    return jax.random.uniform(key, (particles, d), minval=-BOX, maxval=BOX)


@eqx.filter_jit
def solved(
    draw: Draw,
    wrap: Callable[[Any], Any],
    solver: tolerax.CBO,
    keys: PRNGKeyArray,
    d: int,
    steps: int,
    ensemble: bool,
) -> dict[str, Any]:
    """One run for each key, compiled once for all seeds and shifts."""

    def one(key: PRNGKeyArray) -> dict[str, Any]:
        drawn, placed, run = jax.random.split(key, 3)
        fun, ready = draw(drawn, d), solver
        if ensemble:
            ready = dataclasses.replace(solver, ensemble=start(placed, solver.particles, d))
        solution = tolerax.solve(
            tolerax.Objective(wrap(fun)), ready, jnp.zeros(d), key=run, max_steps=steps
        )
        return {
            "error": jnp.max(jnp.abs(solution.x - fun.shift)),
            "value": solution.value,
            "evaluations": solution.work.values,
            "agreed": solution.status == Status.consensus,
        }

    return jax.vmap(one)(keys)


def wilson(successes: int, runs: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of Wilson (*JASA* 22, 1927) for the probability behind a rate."""
    p, extra = successes / runs, z * z / runs
    middle = (p + extra / 2) / (1 + extra)
    half = z * math.sqrt(p * (1 - p) / runs + extra / (4 * runs)) / (1 + extra)
    return middle - half, middle + half


def described(found: Found, below: float = math.inf) -> dict[str, Any]:
    """The rate of success with its interval and what it took."""
    good = found.successes(below)
    return {
        "rate": sum(good) / len(good),
        "wilson": [round(end, 4) for end in wilson(sum(good), len(good))],
        "runs": len(good),
        "evaluations": {
            "median": float(np.median(found.evaluations)),
            "most": max(found.evaluations),
        },
        "median_value": float(np.median(found.value)),
        "ended_in_consensus": sum(found.agreed),
    }


def success(case: Case, settings: Settings) -> Measured:
    """The rate over all runs; the samples are the rates of the seeds."""
    found, rates = Found(), []
    for seed in settings.seeds:
        count = case.each_quick if settings.quick else case.each
        before = len(found.error)
        keys = keys_of(seed, count)
        found.add(
            solved(case.draw, case.wrap, case.solver, keys, case.d, case.steps, case.ensemble)
        )
        rates.append(float(np.mean(found.successes(case.below)[before:])))
    detail = described(found, case.below)
    low, high = detail["wilson"]
    settings.tell(
        f"   {case.name:28s} {detail['rate']:.3f} [{low:.3f}, {high:.3f}] of {detail['runs']} runs,"
        f" {detail['evaluations']['median']:.0f} evaluations, median f "
        f"{detail['median_value']:.2g}, {detail['ended_in_consensus']} agreed"
    )
    return Measured(rates, value=detail["rate"], detail=detail)


def worst(measured: dict[str, Measured]) -> Measured:
    """The smallest of several rates, which are its samples."""
    rates = {name: one.figure for name, one in measured.items()}
    detail = {name: dict(one.detail) for name, one in measured.items()}
    return Measured(list(rates.values()), value=min(rates.values()), detail=detail)
