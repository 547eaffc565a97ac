r"""
A hanging chain
===============

A chain of N rigid links hangs between two nails. It comes to rest where its potential energy is
least, among all shapes whose links have their length:

.. math::

    \min_{p} \ \tfrac{1}{N} \sum_i \tfrac12 (b_i + b_{i+1})
    \qquad\text{where}\qquad |p_{i+1} - p_i|^2 = \ell^2, \quad p_i = (a_i, b_i) .

One equation for each link, all of them curved: a problem for sequential quadratic programming. The
multipliers of the constraints are the forces in the links.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import root_scalar

import tolerax

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
links, width, length = (12 if small else 40), 1.0, 1.6


def nodes(x):
    """All nodes, with the two nails at the ends."""
    nails = jnp.array([[0.0, 0.0], [width, 0.0]])
    return jnp.concatenate([nails[:1], x, nails[1:]])


def energy(x):
    heights = nodes(x)[:, 1]
    return jnp.mean(0.5 * (heights[1:] + heights[:-1]))


def squared_lengths(x):
    return jnp.sum(jnp.diff(nodes(x), axis=0) ** 2, axis=1) * (links / length) ** 2


chain = tolerax.Objective(energy, constraints=squared_lengths, constraint_bounds=(1.0, 1.0))

# %%
# The start is a triangle, a little too short: it need not satisfy the constraints.

t = jnp.linspace(0, 1, links + 1)[1:-1]
start = jnp.stack([width * t, -0.9 * jnp.minimum(t, 1 - t)], axis=1)
shapes = [start]
solver = tolerax.ExactAugmentedLagrangian(atol=1e-9)
solution = tolerax.solve(
    chain, solver, start, callback=lambda step: shapes.append(jnp.asarray(step.query.x))
)
print(solution.message.split(":")[0])
print(f"energy {solution.value:.8f} after {solution.steps} evaluations")
print(f"links are off by {solution.violation:.0e}")

# %%
# A chain of very many links hangs in a catenary, :math:`c \cosh((a - w/2)/c)`, whose parameter c
# follows from the length. The horizontal part of the force is the same in every link, which the
# multipliers show without having been told.

c = root_scalar(lambda c: 2 * c * np.sinh(width / (2 * c)) - length, bracket=(0.05, 10)).root
a = np.linspace(0, width, 200)
catenary = c * (np.cosh((a - width / 2) / c) - np.cosh(width / (2 * c)))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for shape in shapes[:4]:
    axes[0].plot(*nodes(shape).T, color="0.75", lw=1)
axes[0].plot(a, catenary, label="catenary")
axes[0].plot(*nodes(solution.x).T, "o", ms=4, label=f"{links} links")
axes[0].set(xlabel="a", ylabel="b", aspect="equal")
axes[0].legend(loc="upper center")
multipliers = solution.state.solver_state.now.y
along = jnp.diff(nodes(solution.x), axis=0) * multipliers[:, None] * 2 * (links / length) ** 2
axes[1].plot(jnp.abs(along[:, 0]), label="horizontal")
axes[1].plot(along[:, 1], label="vertical")
axes[1].axhline(c / length, color="k", ls=":", label="of the catenary")
axes[1].set(xlabel="link", ylabel="force / weight of the chain")
axes[1].legend()
figure.tight_layout()
spread = float(jnp.max(jnp.abs(along[:, 0])) / jnp.min(jnp.abs(along[:, 0])) - 1)
print(f"horizontal forces differ by {spread:.0e} of their size")
plt.show()
