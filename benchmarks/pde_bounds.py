"""Are the error bounds of P1 to P5 bounds, and how far are they from the true errors?"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.inner import MINRES
from tolerax.problems import CrossBounds
from tolerax.problems.library import (
    EvolutionExample,
    PDEExample,
    burgers_control,
    coefficient_inversion,
    heat_initial_condition,
    poisson_control,
    semilinear_control,
)

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TIGHT = 1e-11
SHIFT = 50.0


def shifted_poisson(n: int) -> PDEExample:
    """P1 with iterations that do not end at once: A + 50 in place of A measures and
    preconditions, and takes the place of A in all constants."""
    p = poisson_control(n)
    lam = float(jnp.min(p.laplacian.eigenvalues))
    area = p.laplacian.spacing[0] ** 2
    return poisson_control(
        n,
        riesz=lambda u: lambda r: p.laplacian.solve(r, SHIFT) / area,
        linear_solver=None,
        stability=lam / (lam + SHIFT),
        smoothness=1 / (lam + SHIFT),
        cross=lambda y, q, u: CrossBounds((lam + SHIFT) ** -0.5, 0.0, 0.0),
    )


def inexact_heat(n: int) -> EvolutionExample:
    """P3 with steps that are not solved at once: half the diffusion preconditions."""
    p = heat_initial_condition(n, kappa=0.0025)
    half = p.problem.method.preconditioner
    return heat_initial_condition(n, linear_solver=MINRES(), preconditioner=half)


@eqx.filter_jit
def evaluate(problem: Any, x: jax.Array, accuracy: tolerax.Accuracy) -> tolerax.Evaluation:
    """One evaluation."""
    return problem.evaluate(tolerax.Query(x, accuracy))


def dual(p: Any, g: jax.Array) -> float:
    """The norm of gradients that belongs to the metric."""
    assert p.problem.metric is not None
    return float(jnp.sqrt(jnp.vdot(g, p.problem.metric.solve(g))))


def measure(settings: Settings) -> dict[str, Measured]:
    """Errors of values and gradients against tight solves, at random controls."""
    n = 16 if settings.quick else 32
    cases: dict[str, Any] = {
        "poisson": shifted_poisson(n),
        "inversion": coefficient_inversion(n),
        "heat": inexact_heat(n),
        "cubic": semilinear_control(n),
        "burgers": burgers_control(2 * n, steps=40),
    }
    violations, near, rows = 0, [], {}
    for name, p in cases.items():
        shares = []
        for seed in settings.seeds:
            noise = np.random.default_rng(seed).normal(size=p.x0.shape)
            size = float(jnp.max(jnp.abs(p.optimum)))
            x = np.random.default_rng(seed + 50).uniform() * p.optimum
            x = x + 0.1 * size * jnp.asarray(noise)
            truth = evaluate(p.problem, x, tolerax.Accuracy(TIGHT, TIGHT))
            for tolerance in TOLERANCES:
                found = evaluate(p.problem, x, tolerax.Accuracy(tolerance, tolerance))
                error = dual(p, jnp.asarray(found.gradient) - jnp.asarray(truth.gradient))
                bound = float(found.gradient_error)
                off = float(jnp.abs(found.value - truth.value))
                # Where the tight solve itself is no better nothing can be said.
                if bound > 10 * float(truth.gradient_error):
                    violations += error > bound + float(truth.gradient_error)
                    shares.append(bound <= 20 * error)
                if float(found.value_error) > 10 * float(truth.value_error):
                    violations += off > float(found.value_error + truth.value_error)
        near += shares
        rows[name] = {"bounds": len(shares), "within_20": float(np.mean(shares))}
        settings.tell(f"   {name}: {rows[name]}")
    return {
        "bound_violations": Measured([violations], detail={"rows": rows}),
        "bound_tight_share": Measured([float(np.mean(near))]),
    }


GROUP = Group(
    "bounds",
    (
        Bar("bound_violations", "<=", 0, "errors above their bound, over P1 to P5"),
        Bar("bound_tight_share", ">=", 0.9, "share of gradient bounds within 20x of the error"),
    ),
    measure,
)
