"""P2, a coefficient from a state: Newton steps, and what adapted tolerances save."""

from typing import Any

import jax.numpy as jnp

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems.library import PDEExample, coefficient_inversion

RTOL = 1e-6


def solved(p: PDEExample, **options: Any) -> tolerax.Solution:
    """P2 solved by Gauss-Newton directions."""
    solver = tolerax.InexactNewton(rtol=RTOL, atol=0.0, gauss_newton=True, **options)
    return tolerax.solve(p.problem, solver, p.x0, max_steps=100)


def measure(settings: Settings) -> dict[str, Measured]:
    """Directions taken, and inner iterations with every linear solve to 1e-10 over ours."""
    sizes = (16,) if settings.quick else (32, 64)
    outers, savings, rows = [], [], {}
    for n in sizes:
        p = coefficient_inversion(n)
        ours = solved(p)
        # Norms of state and adjoint are those of the first state, about 3, and of what drives it.
        fixed = solved(
            p,
            adaptive=False,
            accuracy=tolerax.Accuracy(1e-10, 1e-10),
            hessian_share=1e-10,
        )
        outer = int(ours.state.solver_state.iterations) if bool(ours.success) else float("inf")
        inner = [int(s.work.linear_iterations) for s in (fixed, ours)]
        outers.append(outer)
        savings.append(inner[0] / inner[1] if bool(fixed.success) else float("nan"))
        rows[n] = {
            "outer": outer,
            "outer_fixed": int(fixed.state.solver_state.iterations),
            "iterations": inner[1],
            "iterations_fixed": inner[0],
            "distance": float(p.distance(ours.x) / jnp.sqrt(jnp.mean(p.optimum**2))),
            "status": ours.message[:40],
            "status_fixed": fixed.message[:40],
        }
        settings.tell(f"   n {n}: {rows[n]}")
    return {
        "p2_outer": Measured(outers, max(outers), {"rows": rows}),
        "p2_saving": Measured(savings, min(savings)),
    }


GROUP = Group(
    "p2",
    (
        Bar("p2_outer", "<=", 15, "coefficient inversion: Gauss-Newton steps to 1e-6"),
        Bar("p2_saving", ">=", 1.8, "inner iterations with fixed 1e-10 / adapted tolerances"),
    ),
    measure,
)
