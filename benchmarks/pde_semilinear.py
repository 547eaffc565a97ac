"""P4, semilinear control in the reduced space: Poisson solves to a relative gradient of 1e-7."""

from typing import Any

import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems.library import PDEExample, semilinear_control

RTOL = 1e-7


def solves_to_target(solution: tolerax.Solution) -> float:
    """Poisson solves until the gradient was RTOL of that at the start, with its error bound."""
    rows = solution.history.rows()
    # The first gradient may be all error; this is that of the start as it turned out.
    start = float(solution.state.solver_state.scale)
    norm = rows["gradient_norm"]
    reached = (norm > 0) & (norm + rows["gradient_error"] <= 1.01 * RTOL * start)
    where = np.flatnonzero(reached)
    return float(rows["pde_solves"][where[0]]) if where.size else float("inf")


def tight_lbfgs(p: PDEExample) -> tolerax.Solution:
    """The line search with every solve to 1e-10."""
    solver = tolerax.InexactLineSearch(
        rtol=RTOL, atol=0.0, adaptive=False, accuracy=tolerax.Accuracy(1e-10, 1e-12)
    )
    return tolerax.solve(p.problem, solver, p.x0, max_steps=600)


def newton(p: PDEExample) -> tolerax.Solution:
    """Inexact Newton with its defaults."""
    return tolerax.solve(p.problem, tolerax.InexactNewton(rtol=RTOL, atol=0.0), p.x0)


def measure(settings: Settings) -> dict[str, Measured]:
    """Solves of both, and how those of Newton's method change with the grid."""
    sizes = (32, 64) if settings.quick else (64, 128)
    rows: dict[str, Any] = {}
    units: dict[float, list[float]] = {}
    ratios = []
    for alpha in (1e-4, 1e-6):
        units[alpha] = []
        for n in sizes:
            p = semilinear_control(n, alpha)
            ours = newton(p)
            units[alpha].append(solves_to_target(ours))
            row = {"solves": units[alpha][-1], "total": int(ours.work.pde_solves)}
            row["distance"] = float(p.distance(ours.x))
            if n == sizes[0]:
                peer = tight_lbfgs(p)
                row["lbfgs"] = solves_to_target(peer)
                ratios.append(row["lbfgs"] / row["solves"])
            rows[f"{alpha:g} {n}"] = row
            settings.tell(f"   alpha {alpha:g} n {n}: {row}")
    mesh = max(b / a for a, b in units.values())
    return {
        "p4_reduced_units_1e4": Measured(units[1e-4], max(units[1e-4]), {"rows": rows}),
        "p4_reduced_units_1e6": Measured(units[1e-6], max(units[1e-6])),
        "p4_reduced_vs_lbfgs": Measured(ratios, min(ratios)),
        "p4_reduced_mesh_ratio": Measured([mesh]),
    }


GROUP = Group(
    "p4_reduced",
    (
        Bar("p4_reduced_units_1e4", "<=", 135, "semilinear control: Poisson solves, alpha 1e-4"),
        Bar("p4_reduced_units_1e6", "<=", 1000, "semilinear control: Poisson solves, alpha 1e-6"),
        Bar("p4_reduced_vs_lbfgs", ">=", 2, "solves of L-BFGS with tight solves / ours"),
        Bar("p4_reduced_mesh_ratio", "<=", 1.1, "solves on the fine / the coarse grid"),
    ),
    measure,
)
