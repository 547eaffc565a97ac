"""P3, the heat equation: its gradient beside the formula, and memory as steps grow in number."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems.library import heat_initial_condition

TIGHT = tolerax.Accuracy(1e-12, 1e-12)


def compiled(n: int, steps: int) -> tuple[Any, Any]:
    """P3 without a stored trajectory, and a compiled evaluation."""
    p = heat_initial_condition(n, steps, store_up_to=0)
    whole: Any = eqx.filter_jit(lambda problem, x: problem.evaluate(tolerax.Query(x, TIGHT)))
    return p, whole.lower(p.problem, p.x0).compile()


def measure(settings: Settings) -> dict[str, Measured]:
    """Gradients at random starts, relative to their size; bytes that the compiler sets aside."""
    n = 32 if settings.quick else 64
    errors, sizes, rows = [], [], {}
    for steps in (100, 1000):
        p, evaluate = compiled(n, steps)
        sizes.append(evaluate.compiled.memory_analysis().temp_size_in_bytes)
        for seed in settings.seeds:
            x = jnp.asarray(np.random.default_rng(seed).normal(size=p.x0.shape))
            found, exact = evaluate(p.problem, x).gradient, p.gradient(x)
            errors.append(float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)))
            jax.block_until_ready(found)
        rows[steps] = {"bytes": sizes[-1], "error": max(errors)}
        settings.tell(f"   steps {steps}: {rows[steps]}")
    growth = sizes[1] / sizes[0]
    return {
        "p3_gradient": Measured(errors, max(errors), {"rows": rows}),
        "p3_memory_growth": Measured([growth]),
    }


GROUP = Group(
    "p3",
    (
        Bar("p3_gradient", "<=", 1e-10, "heat equation: relative error to the spectral formula"),
        Bar("p3_memory_growth", "<=", 4, "memory of an evaluation, 1000 steps / 100 steps"),
    ),
    measure,
)
