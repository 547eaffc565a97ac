r"""
A network that obeys an equation
================================

A substance spreads in the water of a soil, which holds some of it back:

.. math::

    m(u)_t = D u_{xx}, \qquad m(u) = u + a u^n .

A network is shown the soil and gives sixteen functions; a layer finds their coefficients by least
squares on the equation, in each of several boxes. It is trained without a single solution.
"""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import tolerax
from tolerax.inner import Pointwise
from tolerax.problems.library import DiffusionSorption, SorptionBasis

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# First what the layer is. For a linear equation, here :math:`u_t + u_x / 2 = u_{xx} / 100`, it is
# dense least squares: the same coefficients to rounding.

keys = jax.random.split(jax.random.key(0), 2)
k, c, phase = 4 * jax.random.normal(keys[0], (3, 12))
px, pt = jax.random.uniform(keys[1], (2, 200, 1))
angle = k[None] * px + c[None] * pt + phase[None]
wave, turned = jnp.cos(angle), -jnp.sin(angle)
Phi = jnp.stack([wave, c[None] * turned, k[None] * turned, -(k[None] ** 2) * wave])
f = jnp.sin(6 * px[:, 0])
equation = Pointwise(lambda z, f: z[0] + z[1] + 0.5 * z[2] - 0.01 * z[3] - f)
found = tolerax.batched_least_squares(equation, jnp.zeros((1, 12)), (Phi[None], f[None]))
dense = np.linalg.lstsq(Phi[0] + Phi[1] + 0.5 * Phi[2] - 0.01 * Phi[3], f)[0]
print(f"largest difference of coefficients: {np.abs(found.w[0] - dense).max():.0e}")

# %%
# Now the soil. Boxes in space and time, tied at their faces:

family = DiffusionSorption(*((24, 17) if small else (40, 33)))
grid = (len(family.x), len(family.t))
train, test = family.sample(jax.random.key(1), 32), family.sample(jax.random.key(2), 3)
reference = family.solve(test)
network = SorptionBasis(family, 8 if small else 16, width=16, layers=2, key=jax.random.key(3))
tied = tolerax.HardConstrained(network, family.equation, tolerax.Boxes(grid, (2, 2)), faces=100.0)

steps = 4 if small else 150
trained = tolerax.train(
    tied,
    train,
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)),
    steps=steps,
    batch=4,
    key=jax.random.key(4),
)
field = eqx.filter_jit(trained.layer)(test)

figure, axes = plt.subplots(3, 3, figsize=(9, 7.5), sharex=True, sharey=True)
for row, u, exact in zip(axes, field.u, reference, strict=True):
    gap = u - exact
    for ax, picture, name in zip(
        row, (exact, u, gap), ("reference", "layer", "error"), strict=True
    ):
        size = float(jnp.abs(gap).max())
        scale = {"cmap": "RdBu", "vmin": -size, "vmax": size} if name == "error" else {}
        shown = ax.imshow(picture.T, origin="lower", extent=(0, 1, 0, 1), aspect="auto", **scale)
        ax.set(title=name)
        figure.colorbar(shown, ax=ax)
    row[0].set(ylabel="time")
figure.supxlabel("depth")
figure.tight_layout()

# %%
# Loss and inner tolerance during training, and what the faces do: without them each expert goes its
# own way.

network = trained.layer.network
alone = tolerax.HardConstrained(network, family.equation, tolerax.Boxes(grid, (2, 2)))
apart = eqx.filter_jit(alone)(test)
print(f"jump between experts: {field.jump.mean():.1e} tied, {apart.jump.mean():.1e} alone")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].semilogy(trained.state.loss, label="mean squared residual")
axes[0].semilogy(trained.state.tolerance, label="inner tolerance")
axes[0].set(xlabel="step")
axes[0].legend()
when = grid[1] // 2 - 1
for u, name in ((apart.u, "alone"), (field.u, "tied"), (reference, "reference")):
    axes[1].plot(family.x, u[0, :, when], label=name)
axes[1].set(xlabel="depth", ylabel="concentration")
axes[1].legend()
figure.tight_layout()
plt.show()
