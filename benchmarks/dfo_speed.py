"""What a solver costs itself, per point."""

import time

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings

N, POINTS, TURNS = 5, 500, 5


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock's function: next to nothing to evaluate."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def per_point(problem: tolerax.Problem, solver: tolerax.Solver) -> float:
    """CPU time in ms, once all is compiled: the least of several turns, since what else the machine
    does adds to it."""
    x0 = jnp.asarray(np.linspace(-1.2, 1.0, N))
    spent = []
    for _ in range(1 + TURNS):
        begun = time.process_time()
        solution = tolerax.solve(problem, solver, x0, max_steps=POINTS, max_work={"points": POINTS})
        points = int(solution.work.points)
        spent.append(1e3 * (time.process_time() - begun) / points)
    return min(spent[1:])


def measure(settings: Settings) -> dict[str, Measured]:
    """The slower of the two solvers, on compiled code and on Python code."""
    bounds = (jnp.full(N, -5.0), jnp.full(N, 5.0))
    compiled = tolerax.Objective(rosenbrock, bounds=bounds)
    plain = tolerax.Objective(
        lambda x: float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)),
        bounds=bounds,
        host=True,
    )
    solvers = {
        "ModelTrustRegion": tolerax.ModelTrustRegion(),
        "ModelTrustRegion(explore=True)": tolerax.ModelTrustRegion(explore=True),
        "CDSM": tolerax.CDSM(),
    }
    rows = {}
    for name, solver in solvers.items():
        rows[name] = {
            "compiled": per_point(compiled, solver),
            "python": per_point(plain, solver),
        }
        settings.tell(f"   {name}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in rows[name].items()))
    samples = [row["compiled"] for row in rows.values()]
    return {
        "overhead_ms": Measured(samples, max(samples), {"rows": rows}),
        "overhead_python_ms": Measured(
            [row["python"] for row in rows.values()],
            max(row["python"] for row in rows.values()),
        ),
    }


GROUP = Group(
    "overhead",
    (
        Bar(
            "overhead_ms", "<=", 0.5, "CPU time a point at n = 5, the slowest solver, compiled code"
        ),
        Bar("overhead_python_ms", "<=", 0.5, "the same where points are Python code"),
    ),
    measure,
)
