"""Wall time beside cbx, the published NumPy package: the same scheme, warm, compilation apart.

Both run anisotropic noise and the soft consensus with the same constants on Rastrigin's function,
without jumps, standardization, tracking or a stopping test. The two take turns, and the least time
of each counts: other processes can only add to it.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

import tolerax
from benchmarks.cbo_functions import BOX, Moved, rastrigin
from benchmarks.cbo_peers import cbx_run
from benchmarks.cbo_runs import keys_of, start
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.solvers import Anisotropic, SoftConsensus

ALPHA, DT = 30.0, 0.01
# The distance to the consensus shrinks by 0.026 a step in logarithm: within 1,000 steps no particle
# reaches it to the last bit, where even a run without a tolerance would end.
S = 1.5


@dataclass(frozen=True)
class Size:
    """Unknowns, particles and steps of a run, and by how much it is to be faster than cbx."""

    d: int
    particles: int
    steps: int
    quick_steps: int
    float64: float
    float32: float

    @property
    def name(self) -> str:
        return f"d {self.d}, N {self.particles}"


SIZES = (
    Size(2, 100, 1000, 1000, 10, 20),
    Size(20, 100, 1000, 1000, 3, 6),
    Size(20, 1000, 500, 300, 2, 3),
    Size(100, 10_000, 40, 15, 1.5, 3),
)
RUNS = 100


def same_scheme(particles: int) -> tolerax.CBO:
    """The solver with the parts that cbx has."""
    return tolerax.CBO(
        particles=particles,
        consensus=SoftConsensus(alpha=ALPHA, standardized=False),
        noise=Anisotropic(s=S, jumps=None),
        dt=DT,
        tol=1e-300,
    )


def ours(size: Size, steps: int, dtype: Any) -> Callable[[], int]:
    """A run as a user starts it; returns how many values it took."""
    problem = tolerax.Objective(Moved(rastrigin, jnp.ones(size.d, dtype)))
    solver, x0, key = same_scheme(size.particles), jnp.zeros(size.d, dtype), jax.random.key(0)
    ensemble = start(key, size.particles, size.d).astype(dtype)
    solver = dataclasses.replace(solver, ensemble=ensemble)

    def run() -> int:
        solution = tolerax.solve(problem, solver, x0, key=key, max_steps=steps)
        return int(solution.work.values)

    return run


def many(size: Size, steps: int, dtype: Any) -> Callable[[], int]:
    """Many runs at once, each with its own start and noise."""
    problem = tolerax.Objective(Moved(rastrigin, jnp.ones(size.d, dtype)))
    solver, x0 = same_scheme(size.particles), jnp.zeros(size.d, dtype)
    keys = keys_of(0, RUNS)

    @jax.jit
    def runs(keys: PRNGKeyArray) -> tolerax.Solution:
        def one(key: PRNGKeyArray) -> tolerax.Solution:
            ensemble = start(key, size.particles, size.d).astype(dtype)
            ready = dataclasses.replace(solver, ensemble=ensemble)
            return tolerax.solve(problem, ready, x0, key=key, max_steps=steps)

        return jax.vmap(one)(keys)

    return lambda: int(jnp.sum(jax.block_until_ready(runs(keys)).work.values))


def objective_alone(size: Size, steps: int, dtype: Any, runs: int) -> Callable[[], int]:
    """As many evaluations of the objective, compiled, and nothing else."""
    fun = Moved(rastrigin, jnp.ones(size.d, dtype))
    x = start(jax.random.key(0), runs * size.particles, size.d).astype(dtype)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        # What is added keeps the compiler from evaluating once for all steps.
        add = lambda k, total: total + jnp.sum(jax.vmap(fun)(x + 1e-6 * total))  # noqa: E731
        return jax.lax.fori_loop(0, steps, add, jnp.zeros((), dtype))

    def evaluated() -> int:
        run(x).block_until_ready()
        return steps * len(x)

    return evaluated


def published(size: Size, steps: int, runs: int) -> Callable[[], int]:
    """The same runs by cbx, whose arrays are float64."""
    fun = Moved(rastrigin, np.ones(size.d))
    x = np.random.default_rng(0).uniform(-BOX, BOX, (runs, size.particles, size.d))

    def run() -> int:
        dynamic = cbx_run(fun, x, steps, s=S, alpha=ALPHA, dt=DT, seed=0)
        return int(np.sum(dynamic.num_f_eval))

    return run


def least_seconds(contenders: dict[str, Callable[[], int]], repeats: int, values: int) -> dict:
    """The least wall time of each, in turns after one call that compiles; all must have evaluated
    the same number of points."""
    for name, run in contenders.items():
        if (counted := run()) != values:
            raise RuntimeError(f"{name} evaluated {counted} points, not {values}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: min(found) for name, found in times.items()}


def compared(size: Size, settings: Settings, runs: int = 1) -> dict[str, Any]:
    """Seconds of each and what we are faster by."""
    steps = size.quick_steps if settings.quick else size.steps
    make = ours if runs == 1 else many
    contenders = {
        "float64": make(size, steps, jnp.float64),
        "float32": make(size, steps, jnp.float32),
        "cbx": published(size, steps, runs),
        "objective, float64": objective_alone(size, steps, jnp.float64, runs),
        "objective, float32": objective_alone(size, steps, jnp.float32, runs),
    }
    repeats = 3 if settings.quick else 7
    seconds = least_seconds(contenders, repeats, runs * steps * size.particles)
    faster = {name: seconds["cbx"] / seconds[name] for name in ("float64", "float32")}
    settings.tell(
        f"   {size.name}, runs {runs}: cbx {seconds['cbx']:.3f} s, "
        + ", ".join(
            f"{n} {seconds[n]:.3f} s ({by:.2f} x; the objective alone "
            f"{seconds[f'objective, {n}']:.3f} s)"
            for n, by in faster.items()
        )
    )
    return {"seconds": seconds, "faster": faster, "steps": steps}


def measure_speed(settings: Settings) -> dict[str, Measured]:
    rows, shares = {}, []
    for size in SIZES:
        row = compared(size, settings)
        rows[size.name] = row | {"target": {"float64": size.float64, "float32": size.float32}}
        shares += [row["faster"][name] / getattr(size, name) for name in ("float64", "float32")]
    detail = {"sizes": rows}
    return {"speed_vs_cbx": Measured(shares, value=min(shares, default=math.nan), detail=detail)}


def measure_many(settings: Settings) -> dict[str, Measured]:
    """In float64, as cbx; float32 is in the details."""
    row = compared(Size(20, 100, 200, 50, 4, 4), settings, RUNS)
    return {"speed_many_runs": Measured([row["faster"]["float64"]], detail=row)}


SPEED_GROUP = Group(
    "speed",
    (Bar("speed_vs_cbx", ">=", 1, "smallest of (speed-up over cbx / its target), same scheme"),),
    measure_speed,
)

MANY_GROUP = Group(
    "many",
    (Bar("speed_many_runs", ">=", 4, "speed-up over cbx, 100 runs of d 20, N 100 at once"),),
    measure_many,
)
