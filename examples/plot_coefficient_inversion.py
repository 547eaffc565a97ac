r"""
Find a coefficient from a temperature
=====================================

Heat flows through a material of unknown conductivity :math:`e^m`. The temperature y is measured
everywhere, with noise in mind, and solves

.. math::

    -\nabla \cdot (e^m \nabla y) = f .

We look for m by least squares with a Sobolev regularization,

.. math::

    \tfrac12 m^\top R\, m = \tfrac{\gamma}{2} \|\nabla m\|^2 + \tfrac{\delta}{2} \|m\|^2 ,

which is also the inner product in which steps and gradients are measured. So iterations do not
depend on the grid. The problem is made such that its optimum is known.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import tolerax
from tolerax.problems.library import coefficient_inversion

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# Gauss-Newton directions on two grids. Every product with the Hessian is two linear solves with the
# heat equation, each to its own tolerance.

solver = tolerax.InexactNewton(rtol=1e-6, atol=0.0, gauss_newton=True)


def inverted(n: int) -> tuple[Any, tolerax.Solution]:
    p = coefficient_inversion(n)
    solution = tolerax.solve(p.problem, solver, p.x0)
    model = solution.state.solver_state.model
    error = float(p.distance(solution.x) / jnp.sqrt(jnp.mean(p.optimum**2)))
    print(
        f"{n} x {n}: {solution.state.solver_state.iterations} steps, {model.products} products, "
        f"{solution.work.linear_iterations} inner iterations, relative error {error:.0e}"
    )
    return p, solution


p, solution = inverted(7 if small else 15)
if not small:
    p, solution = inverted(31)

# %%
# What was found, and how the gradient fell.

figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.9))
for ax, m, name in zip(axes[:2], (p.optimum, solution.x), ("optimum", "found"), strict=True):
    shown = ax.imshow(m.T, origin="lower", extent=(0, 1, 0, 1))
    ax.set(title=f"log conductivity, {name}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=ax, shrink=0.85)
rows = solution.history.rows()
axes[2].semilogy(rows["linear_iterations"], rows["gradient_norm"], "o-", label="gradient")
axes[2].semilogy(
    rows["linear_iterations"], rows["gradient_error"], "s--", label="bound on its error"
)
axes[2].set(xlabel="inner iterations", title="accuracy as it is needed")
axes[2].legend()
figure.tight_layout()

# %%
# Is the hand-made problem right? The Taylor test compares every derivative with differences.

print(tolerax.check_gradient(p.problem, 0.5 * p.optimum))
plt.show()
