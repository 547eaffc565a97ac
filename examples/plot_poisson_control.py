r"""
Heat a plate, and pay for each solve only what is needed
========================================================

Which sources u heat a plate to a wanted temperature :math:`y_d`? With

.. math::

    \min_u \ \tfrac12 \|y - y_d\|^2 + \tfrac{\alpha}{2} \|u\|^2
    \qquad\text{where}\qquad -\Delta y + y^3 = u + s,

every look at the cost is the solution of a nonlinear equation on thousands of points. Solving it to
ten digits each time is what most codes do. Here the optimizer says how accurately it needs to know.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.problems.library import poisson_control, semilinear_control

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
n = 15 if small else 63

# %%
# The wanted temperature jumps from 0 to 1, which no source can reach. How close it is worth to come
# is for alpha to say. The linear equation first, :math:`-\Delta y = u`: it has a fast solve, and
# the problem is quadratic, so that one Newton step does it. Its optimum is known mode by mode.

solver = tolerax.InexactNewton(rtol=1e-8, atol=0.0, forcing=1e-10)
figure, axes = plt.subplots(2, 3, figsize=(9, 5.4))
for column, alpha in zip(axes.T, (1e-2, 1e-4, 1e-6), strict=True):
    p = poisson_control(n, alpha, bounds=(-jnp.inf, jnp.inf))
    solution = tolerax.solve(p.problem, solver, p.x0)
    error = float(p.distance(solution.x) / jnp.sqrt(jnp.mean(p.optimum**2)))
    products = int(solution.state.solver_state.model.products)
    print(f"alpha {alpha:g}: {products} Hessian products, relative error {error:.0e}")
    state = p.laplacian.solve(solution.x)
    for ax, picture, name in zip(column, (state, solution.x), ("state", "control"), strict=True):
        shown = ax.imshow(picture.T, origin="lower", extent=(0, 1, 0, 1))
        ax.set(title=rf"{name}, $\alpha$ = {alpha:g}", xticks=[], yticks=[])
        figure.colorbar(shown, ax=ax, shrink=0.85)
figure.tight_layout()

# %%
# Sources cannot cool, and have a limit: bounds on the control, kept by projection.

p = poisson_control(n, 1e-5, bounds=(0.0, 30.0))
solution = tolerax.solve(p.problem, tolerax.InexactNewton(rtol=1e-6, atol=0.0), p.x0)
share = float(np.mean((np.asarray(solution.x) > 0) & (np.asarray(solution.x) < 30)))
print(f"{solution.steps} evaluations; {100 * share:.0f} % of the control is within its bounds")
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
pictures = (p.laplacian.solve(solution.x), solution.x)
for ax, picture, name in zip(axes, pictures, ("state", "control within bounds"), strict=True):
    shown = ax.imshow(picture.T, origin="lower", extent=(0, 1, 0, 1))
    ax.set(title=name, xticks=[], yticks=[])
    figure.colorbar(shown, ax=ax, shrink=0.85)
figure.tight_layout()

# %%
# Now the nonlinear equation. The same solver, with the tolerances that it chooses, and with all of
# them fixed at ten digits:

p = semilinear_control(n, 1e-4)
tight = tolerax.Accuracy(1e-10, 1e-12)
fixed = {"adaptive": False, "accuracy": tight, "hessian_share": 1e-10}
figure, ax = plt.subplots(figsize=(5.5, 3.4))
for name, options in {"adapted": {}, "fixed at 1e-10": fixed}.items():
    if small and options:
        continue  # it takes another compilation
    newton = tolerax.InexactNewton(rtol=1e-7, atol=0.0, **options)
    solution = tolerax.solve(p.problem, newton, p.x0)
    rows = solution.history.rows()
    relative = rows["gradient_norm"] / solution.state.solver_state.scale
    known = relative > 0  # the first look was too coarse to see a gradient
    ax.semilogy(rows["pde_solves"][known], relative[known], "o-", label=name)
    print(f"{name}: {solution.work.pde_solves} Poisson solves")
ax.set(xlabel="Poisson solves", ylabel="gradient / gradient at the start")
ax.legend(title="tolerances")
figure.tight_layout()
plt.show()
