"""The figures of optimization over trained networks: `python -m benchmarks attack`.

Cost is counted in points, each of them one pass through the network; a gradient comes with one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

import tolerax
from benchmarks import dfo_peers
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems.library import digits_counterfactual, image_mixture, reactor
from tolerax.solution import Step

FEASIBLE = 1e-6  # the violation up to which the solvers take a point for feasible
Trace = list[tuple[int, float]]


def trace(
    problem: tolerax.Problem,
    solver: tolerax.Solver,
    x0: jax.Array,
    points: int,
    key: int,
    until: float = -np.inf,
) -> Trace:
    """Points so far and the best feasible value, after each answer; ends at a value or a budget."""
    found: Trace = []

    def note(step: Step) -> None:
        best = step.run.best
        value = step.value if float(best.violation) <= FEASIBLE else np.inf
        found.append((int(step.run.work.points), value))
        if value <= until:
            raise StopIteration

    tolerax.solve(
        problem,
        solver,
        x0,
        key=jax.random.key(key),
        max_steps=points,
        max_work={"points": points},
        callback=note,
    )
    return found


def points_to(found: Trace, value: float) -> float:
    """Points until a value was reached, infinite if it was not."""
    return next((float(points) for points, best in found if best <= value), np.inf)


def by_scipy(problem: tolerax.Problem, x0: jax.Array, method: str) -> dict[str, Any]:
    """SciPy with exact gradients of value and constraints, the honest baseline where there are any,
    or COBYQA, which uses none: its last value and violation, and how often it asked for a value."""
    ask = tolerax.Accuracy(1e-6, 1e-6)

    @jax.jit
    def value(x: jax.Array) -> tuple[jax.Array, Any]:
        answer = problem.evaluate(tolerax.Query(x, ask, problem.cold_start(), derivatives=1))
        return answer.value, answer.gradient

    @jax.jit
    def limits(x: jax.Array) -> jax.Array:
        answer = problem.evaluate(tolerax.Query(x, ask, problem.cold_start(), derivatives=0))
        return ravel_pytree(answer.constraints)[0]

    calls = 0

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal calls
        calls += 1
        f, g = value(jnp.asarray(x))
        return float(f), np.asarray(g, float)

    options: dict[str, Any] = {"jac": True, "method": method, "options": {"maxiter": 1000}}
    if method == "COBYQA":
        options = {"method": method, "options": {"maxfev": 3000}}
    if problem.constraint_bounds is not None:
        slope = jax.jit(jax.jacrev(limits))
        options["constraints"] = {
            "type": "ineq",
            "fun": lambda x: -np.asarray(limits(jnp.asarray(x)), float),
            "jac": lambda x: -np.asarray(slope(jnp.asarray(x)), float),
        }
    if problem.bounds is not None:
        low, high = (np.broadcast_to(np.asarray(b, float), x0.shape) for b in problem.bounds)
        options["bounds"] = list(zip(low, high, strict=True))
    ask_for = fun if "jac" in options else lambda x: fun(x)[0]
    end = scipy.optimize.minimize(ask_for, np.asarray(x0, float), **options)
    worst = 0.0
    if problem.constraint_bounds is not None:
        worst = float(jnp.max(limits(jnp.asarray(end.x))))
    return {"value": float(end.fun), "violation": max(worst, 0.0), "calls": calls}


def by_cma(problem: tolerax.Problem, x0: jax.Array, seed: int) -> list[float]:
    """The points of CMA-ES to `TARGETS`. (The other peers of `dfo` are made for few variables.)"""
    ask = tolerax.Accuracy(1e-6, 1e-6)
    assert problem.bounds is not None
    # The box of the peers is another one.
    scale = float(jnp.max(jnp.asarray(problem.bounds[1]))) / dfo_peers.BOUND

    @jax.jit
    def value(x: jax.Array) -> jax.Array:
        query = tolerax.Query(scale * x, ask, problem.cold_start(), derivatives=0)
        return problem.evaluate(query).value

    values = dfo_peers.values_of(
        "CMA-ES",
        lambda x: float(value(jnp.asarray(x))),
        np.asarray(x0, float) / scale,
        PEER_POINTS,
        seed,
    )
    found = list(enumerate(np.minimum.accumulate(values).tolist(), 1))
    return [points_to(found, target) for target in TARGETS]


NOMAD_POINTS = 300


def by_nomad(problem: tolerax.Problem, x0: jax.Array, budget: int, seed: int) -> dict[str, Any]:
    """The best feasible value of NOMAD within the bounds, and after how many points it came."""
    ask = tolerax.Accuracy(1e-6, 1e-6)
    found: Trace = [(0, np.inf)]

    @jax.jit
    def answer(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = problem.evaluate(tolerax.Query(x, ask, problem.cold_start(), derivatives=0))
        return known.value, ravel_pytree(known.constraints)[0]

    def outputs(x: np.ndarray) -> list[float]:
        value, limits = (np.asarray(part, float) for part in answer(jnp.asarray(x)))
        best = float(value) if np.max(limits) <= FEASIBLE else np.inf
        found.append((len(found), min(best, found[-1][1])))
        return [float(value), *limits.tolist()]

    assert problem.bounds is not None
    low, high = (np.broadcast_to(np.asarray(b, float), x0.shape) for b in problem.bounds)
    count = jax.eval_shape(answer, x0)[1].size
    dfo_peers.nomad_by(outputs, np.asarray(x0, float), (low, high), count, budget, seed)
    best = found[-1][1]
    return {"value": best, "points": int(points_to(found, best))}


def solvers() -> dict[str, tolerax.Solver]:
    """The hybrid, and those that use values alone."""
    return {
        "attack": tolerax.DirectionalAttack(),
        "cdsm": tolerax.CDSM(),
        "models": tolerax.ModelTrustRegion(explore=True),
    }


# -- a mixture of images --------------------------------------------------------------------------

TARGETS = (1e-6, 1e-8)
PEER_POINTS = 9000


def measure_image(settings: Settings) -> dict[str, Measured]:
    """Points of the hybrid and of the pure methods to two values, beside CMA-ES, and L-BFGS-B with
    exact gradients."""
    needed: dict[float, list[float]] = {target: [] for target in TARGETS}
    beside = []
    for seed in settings.seeds:
        known = image_mixture(100, seed=seed)
        found = {
            name: trace(known.problem, solver, known.x0, 10_000, seed, min(TARGETS))
            for name, solver in solvers().items()
        }
        row = {name: [points_to(f, target) for target in TARGETS] for name, f in found.items()}
        if not settings.quick:
            row["CMA-ES"] = by_cma(known.problem, known.x0, seed)
        gradients = by_scipy(known.problem, known.x0, "L-BFGS-B")
        beside.append({"points to": row, "L-BFGS-B": gradients})
        settings.tell(f"   seed {seed}: {beside[-1]}")
        for target, points in zip(TARGETS, row["attack"], strict=True):
            needed[target].append(points)
    detail = {"rows": beside}
    return {
        "image_points_1e6": Measured(needed[1e-6], detail=detail),
        "image_points_1e8": Measured(needed[1e-8]),
    }


# -- a counterfactual -----------------------------------------------------------------------------

BUDGET = 11_800


def measure_latent(settings: Settings) -> dict[str, Measured]:
    """How much sooner the hybrid is where CDSM ends, and whether it ends lower than the best of the
    pure methods, all with the same budget."""
    speedups, gaps, rows = [], [], []
    budget = BUDGET // 10 if settings.quick else BUDGET
    for seed in settings.seeds:
        known = digits_counterfactual(seed=seed)
        found = {
            name: trace(known.problem, solver, known.x0, budget, seed)
            for name, solver in solvers().items()
        }
        ends = {name: f[-1][1] for name, f in found.items()}
        spent = points_to(found["cdsm"], ends["cdsm"])
        speedups.append(spent / points_to(found["attack"], ends["cdsm"]))
        gaps.append(ends["attack"] - min(ends["cdsm"], ends["models"]))
        peers = ("SLSQP",) if settings.quick else ("SLSQP", "COBYQA")
        beside = {name: by_scipy(known.problem, known.x0, name) for name in peers}
        rows.append({"ends": ends, **beside})
        settings.tell(f"   seed {seed}: {rows[-1]}, speedup {speedups[-1]:.1f}")
    return {
        "latent_speedup": Measured(speedups, detail={"rows": rows}),
        "latent_final_gap": Measured(gaps, max(gaps)),
    }


# -- a reactor ------------------------------------------------------------------------------------


def on_grid(problem: tolerax.Problem, size: int) -> float:
    """The largest feasible value on a grid of the unit square, and on finer ones around it: the
    optimum lies in a corner between two constraints."""
    ask = tolerax.Accuracy(1e-6, 1e-6)

    def at(x: jax.Array) -> jax.Array:
        answer = problem.evaluate(tolerax.Query(x, ask, problem.cold_start(), derivatives=0))
        assert answer.violation is not None
        return jnp.where(answer.violation <= FEASIBLE, -answer.value, -jnp.inf)

    @jax.jit
    def best(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jnp.linspace(low, high, size).T
        row = lambda a: jax.vmap(lambda b: at(jnp.stack([a, b])))(second)  # noqa: E731
        values = jax.lax.map(row, first)
        i, j = jnp.unravel_index(jnp.argmax(values), values.shape)
        return values[i, j], jnp.stack([first[i], second[j]])

    low, high = jnp.zeros(2), jnp.ones(2)
    value = -np.inf
    for _ in range(3):
        found, x = best(low, high)
        value = max(value, float(found))
        width = 20 * (high - low) / size
        low, high = jnp.clip(x - width, 0.0, 1.0), jnp.clip(x + width, 0.0, 1.0)
    return value


def measure_reactor(settings: Settings) -> dict[str, Measured]:
    """The worst of 20 random starts over the best point of a grid."""
    known = reactor(seed=0)
    best = on_grid(known.problem, 1001)
    starts = np.random.default_rng(settings.seeds[0]).random((4 if settings.quick else 20, 2))
    shares, rows = [], []
    for key, start in enumerate(starts):
        solution = tolerax.solve(
            known.problem,
            tolerax.DirectionalAttack(),
            jnp.asarray(start),
            key=jax.random.key(key),
            max_steps=3000,
            max_work={"points": 3000},
        )
        feasible = float(solution.violation) <= FEASIBLE
        shares.append(-float(solution.value) / best if feasible else 0.0)
        row = {"x": np.asarray(solution.x).tolist(), "points": int(solution.work.points)}
        peers = ("SLSQP", "COBYQA")
        beside = {name: by_scipy(known.problem, jnp.asarray(start), name) for name in peers}
        if not settings.quick:
            beside["NOMAD"] = by_nomad(known.problem, jnp.asarray(start), NOMAD_POINTS, key)
        rows.append({**row, **beside})
    settings.tell(f"   grid {best:.6f}, shares {np.round(shares, 5).tolist()}")
    return {"reactor_vs_grid": Measured(shares, min(shares), {"grid": best, "rows": rows})}


GROUPS = (
    Group(
        "image",
        (
            Bar("image_points_1e6", "<=", 400, "points until within 1e-6 of the optimum, n = 100"),
            Bar("image_points_1e8", "<=", 9000, "until within 1e-8"),
        ),
        measure_image,
    ),
    Group(
        "latent",
        (
            Bar("latent_speedup", ">=", 20, "points of CDSM over those of the hybrid to its end"),
            Bar("latent_final_gap", "<=", 0, "hybrid's end minus the best pure one's, worst seed"),
        ),
        measure_latent,
    ),
    Group(
        "reactor",
        (Bar("reactor_vs_grid", ">=", 0.999, "worst of 20 starts over the best of a grid"),),
        measure_reactor,
    ),
)
