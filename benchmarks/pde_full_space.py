"""P4, semilinear control in the full space: Poisson solves to a relative reduced gradient of 1e-7.

Every use of the preconditioner counts as two solves. The reduced gradient is computed from outside,
with a state solved to rounding, and not counted.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.inner import Laplacian, refine
from tolerax.problems import FullSpace, MatchedSchur
from tolerax.problems.library import PDEExample, semilinear_control

RTOL = 1e-7
# Of nested iteration, found with a finest grid of 31: residuals on coarse grids and on the fine one
# relative to the first, and the forcing there, for two accurate steps rather than many loose ones.
COARSE, FINE, FORCING = 1e-5, 1e-9, 1e-3
Grid = Float[Array, "n n"]


class Matched(eqx.Module):
    """The matched Schur complement at the state, for the reaction y^3."""

    laplacian: Laplacian
    alpha: Any

    def __call__(self, y: Grid, u: Grid) -> MatchedSchur:
        del u
        return MatchedSchur(self.laplacian, self.alpha, jnp.mean(3 * y**2))


@functools.cache
def example(n: int, alpha: float) -> tuple[PDEExample, FullSpace]:
    p = semilinear_control(n, alpha)
    return p, FullSpace(p.cost, p.residual, Matched(p.laplacian, jnp.asarray(alpha)))


@eqx.filter_jit
def reduced_gradient(p: PDEExample, u: Grid, y: Grid) -> Float[Array, ""]:
    """The norm of the gradient of the reduced problem in L2, state and adjoint to rounding."""
    h2 = p.laplacian.spacing[0] ** 2

    def newton(_: Any, y: Grid) -> Grid:
        r = p.residual(y, u) / h2
        operator = lambda v: p.laplacian.mv(v) + 3 * y**2 * v  # noqa: E731
        return y - jax.scipy.sparse.linalg.cg(operator, r, tol=1e-13, M=p.laplacian.solve)[0]

    y = jax.lax.fori_loop(0, 12, newton, y)
    operator = lambda v: p.laplacian.mv(v) + 3 * y**2 * v  # noqa: E731
    g_y, g_u = jax.grad(p.cost, argnums=(0, 1))(y, u)
    q = jax.scipy.sparse.linalg.cg(operator, g_y / h2, tol=1e-13, M=p.laplacian.solve)[0]
    return jnp.linalg.norm(g_u / h2 + q)


def solves_to_target(
    n: int,
    alpha: float,
    start: Any = None,
    multipliers: Any = None,
    forcing: float = 0.3,
    atol: float | None = None,
) -> tuple[float, tolerax.Solution]:
    """Solves until the reduced gradient was RTOL of that at zero, and the run."""
    p, problem = example(n, alpha)
    zero = jnp.zeros((n, n))
    wanted = RTOL * float(reduced_gradient(p, zero, zero))
    seen: list[float] = []

    def look(step: Any) -> None:
        y, u = step.query.x
        if not seen and float(reduced_gradient(p, u, y)) <= wanted:
            seen.append(float(step.run.work.pde_solves))
            raise StopIteration

    solver = tolerax.ExactAugmentedLagrangian(
        rtol=1e-9 if atol is None else 0.0,
        atol=0.0 if atol is None else atol,
        multipliers=multipliers,
        forcing=forcing,
    )
    start = (zero, zero) if start is None else start
    solution = tolerax.solve(problem, solver, start, max_steps=40, callback=look)
    return (seen[0] if seen else float("inf")), solution


def nested(n: int, alpha: float) -> float:
    """Solves on the finest grid, where coarser ones gave the start.

    The optimum of P4 is the same function on every grid, so a start is as good as interpolation is;
    where discretizations differ it is worse by that.
    """
    sizes = [n]
    while sizes[0] > 15:
        sizes.insert(0, (sizes[0] - 1) // 2)
    start = multipliers = scale = None
    for size in sizes[:-1]:
        problem = example(size, alpha)[1]
        zero = jnp.zeros((size, size))
        rtol, atol = (COARSE, 0.0) if scale is None else (0.0, COARSE * scale)
        solver = tolerax.ExactAugmentedLagrangian(rtol=rtol, atol=atol, multipliers=multipliers)
        coarse = tolerax.solve(problem, solver, (zero, zero) if start is None else start)
        state = coarse.state.solver_state
        # What the residual was on the coarsest grid, from zero, is the unit on all of them.
        scale = float(state.scale) if scale is None else scale
        start = jax.tree.map(refine, coarse.x)
        multipliers = refine(state.now.y.reshape(size, size))
    assert scale is not None
    return solves_to_target(n, alpha, start, multipliers, FORCING, FINE * scale)[0]


def measure(settings: Settings) -> dict[str, Measured]:
    """Units at two weights and on two grids, and with nested iteration."""
    sizes = (31, 63) if settings.quick else (64, 128)
    rows: dict[str, Any] = {}
    units: dict[float, list[float]] = {}
    for alpha in (1e-4, 1e-6):
        units[alpha] = []
        for n in sizes:
            count, solution = solves_to_target(n, alpha)
            units[alpha].append(count)
            rows[f"{alpha:g} {n}"] = {"solves": count, "answers": int(solution.steps)}
            settings.tell(f"   alpha {alpha:g} n {n}: {rows[f'{alpha:g} {n}']}")
    mesh = max(fine / coarse for coarse, fine in units.values())
    counts = []
    for alpha in (1e-2, 1e-4, 1e-6, 1e-8):
        for n in (63,) if settings.quick else (63, 127):
            counts.append(nested(n, alpha))
            settings.tell(f"   nested alpha {alpha:g} n {n}: {counts[-1]}")
    return {
        "p4_units_1e4": Measured(units[1e-4], max(units[1e-4]), {"rows": rows}),
        "p4_units_1e6": Measured(units[1e-6], max(units[1e-6])),
        "p4_mesh_ratio": Measured([mesh]),
        "p4_units_nested": Measured(counts, float(np.max(counts))),
    }


GROUP = Group(
    "p4_full",
    (
        Bar("p4_units_1e4", "<=", 80, "semilinear control, full space: Poisson solves, alpha 1e-4"),
        Bar("p4_units_1e6", "<=", 70, "semilinear control, full space: Poisson solves, alpha 1e-6"),
        Bar("p4_mesh_ratio", "<=", 1.1, "solves on the fine / the coarse grid"),
        Bar("p4_units_nested", "<=", 36, "fine-grid solves with nested iteration, worst alpha"),
    ),
    measure,
)
