"""The PDE problem of the sketching paper (arXiv 2305.18379), in its size and on a 63 x 63 grid.

Minimize `|W - W_d|^2 / 2 + 0.1 |Z|^2 / 2` subject to `Laplace W + Z = 0`, from all ones, to a
largest entry of the optimality conditions of 1e-4. The time is that of the best of five runs after
one that compiles.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.inner import Laplacian
from tolerax.problems import FullSpace, MatchedSchur

ALPHA = 0.1


def paper(n: int) -> tuple[FullSpace, Any, Any]:
    """The problem, its start, and the optimality of an answer; cost and equation are weighted by
    the area of a cell, which is undone in the last."""
    laplacian = Laplacian((n, n), spacing=2 / (n + 1))
    area = (2 / (n + 1)) ** 2
    s = (0.1 / np.sqrt(15)) * (jnp.arange(1, n + 1) - (n + 1) / 2)
    target = jnp.sin(4 + s)[:, None] + jnp.cos(3 + s)[None]

    def cost(w: Any, z: Any) -> Any:
        return 0.5 * area * (jnp.sum((w - target) ** 2) + ALPHA * jnp.sum(z**2))

    def equation(w: Any, z: Any) -> Any:
        return area * (z - laplacian.mv(w))

    def optimality(x: Any, y: Any) -> float:
        lagrangian = lambda x: cost(*x) + jnp.vdot(y, equation(*x))  # noqa: E731
        parts = [*jax.grad(lagrangian)(x), equation(*x)]
        return max(float(jnp.max(jnp.abs(part))) for part in parts) / area

    problem = FullSpace(cost, equation, lambda w, z: MatchedSchur(laplacian, ALPHA, 0.0))
    ones = jnp.ones((n, n))
    return problem, (ones, ones), optimality


def measure(settings: Settings) -> dict[str, Measured]:
    """Seconds and outer steps on both grids."""
    seconds, outer = [], []
    solver = tolerax.ExactAugmentedLagrangian(rtol=1e-6, atol=0.0, forcing=1e-3)
    for n in (3, 63):
        problem, start, optimality = paper(n)
        solution = tolerax.solve(problem, solver, start)  # compiles
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            solution = tolerax.solve(problem, solver, start)
            jax.block_until_ready(solution.x)
            best = min(best, time.perf_counter() - began)
        state = solution.state.solver_state
        left = optimality(solution.x, state.now.y.reshape(n, n))
        good = bool(solution.success) and left <= 1e-4
        seconds.append(best if good else float("inf"))
        outer.append(float(state.iterations) if good else float("inf"))
        settings.tell(f"   N {n}: {best:.3f} s, {outer[-1]:g} steps, optimality {left:.1e}")
    return {
        "sketch_seconds": Measured(seconds, max(seconds)),
        "sketch_outer": Measured(outer, max(outer)),
    }


GROUP = Group(
    "sketch",
    (
        Bar("sketch_seconds", "<=", 0.1, "PDE case of the sketching paper, N 3 and 63: seconds"),
        Bar("sketch_outer", "<=", 4, "the same: outer steps"),
    ),
    measure,
)
