r"""
Experts for a flow
==================

Vorticity in a square that repeats itself,

.. math::

    w_t + u w_x + v w_y = \nu \Delta w ,

with the velocity :math:`(u, v)` that belongs to :math:`w`. A network is shown the vorticity at
the beginning and gives functions of space and time; a layer finds their coefficients by least
squares on the equation, once for all, and once for each of four experts: two halves of the square
by an early and a late part, which blend. The velocity at a point depends on the vorticity
everywhere, so experts solve together for the field that they make. The network is trained without
a single solution.
"""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import tolerax
from tolerax.problems.library import NavierStokes, VorticityBasis

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# The reference comes from a pseudo-spectral method, and is kept on disk: the second time it is
# there at once.

family = NavierStokes(*((16, 7) if small else (32, 9)), duration=1.0 if small else 2.0)
train, test = family.sample(jax.random.key(1), 16), family.sample(jax.random.key(2), 2)
reference = family.solve(test, cache=not small)
print(
    f"{reference.shape[1]} frames of {family.n} x {family.n} points, up to t = {family.duration:g}"
)

# %%
# One network for both layers, trained within the one that has experts.

outputs = 12 if small else 48
network = VorticityBasis(family, outputs, width=8 if small else 16, key=jax.random.key(3))
whole = tolerax.Boxes(family.grid, (1, 1, 1))
boxes = tolerax.Boxes(
    family.grid,
    (2, 2, 1),
    overlap=(3, 4, 0) if small else (4, 8, 0),
    periodic=(False, True, True),
)
steps = 3 if small else 60
trained = tolerax.train(
    tolerax.HardConstrained(network, family.equation, boxes, joint=True),
    train,
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)),
    steps=steps,
    batch=2,
    key=jax.random.key(4),
)
network = trained.layer.network
single = tolerax.HardConstrained(network, family.equation, whole)
fields = {
    "reference": reference,
    "one layer": eqx.filter_jit(single)(test).u,
    "four experts": eqx.filter_jit(trained.layer)(test).u,
}
for name, w in list(fields.items())[1:]:
    print(
        f"{name}: relative error {jnp.linalg.norm(w - reference) / jnp.linalg.norm(reference):.3f}"
    )

# %%
# Frames of one flow, and the error of each layer below it on a scale of its own.

shown = np.linspace(0, family.times - 1, 5).round().astype(int)
rows = [(name, w[0], "RdBu_r") for name, w in fields.items()]
rows += [(f"error, {name}", w[0] - reference[0], "PuOr") for name, w in list(fields.items())[1:]]
largest = {"RdBu_r": float(jnp.abs(reference[0]).max())}
largest["PuOr"] = max(float(jnp.abs(w).max()) for _, w, cmap in rows if cmap == "PuOr")
figure, axes = plt.subplots(5, 5, figsize=(9, 9), sharex=True, sharey=True, layout="constrained")
for row, (name, w, cmap) in zip(axes, rows, strict=True):
    pictures = []
    for ax, k in zip(row, shown, strict=True):
        scale = {"cmap": cmap, "vmin": -largest[cmap], "vmax": largest[cmap]}
        pictures.append(ax.imshow(w[k].T, origin="lower", extent=(0, 1, 0, 1), **scale))
        ax.set(xticks=[], yticks=[])
    row[0].set(ylabel=name)
    figure.colorbar(pictures[0], ax=row, shrink=0.9)
for ax, k in zip(axes[0], shown, strict=True):
    ax.set(title=f"t = {family.t[k]:.2g}")
figure.suptitle("Vorticity")

# %%
# Where errors come from: they grow with time, and with the residual that is left before.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
size = jnp.linalg.norm(reference.reshape(2, family.times, -1), axis=2)
for name, w in list(fields.items())[1:]:
    gap = jnp.linalg.norm((w - reference).reshape(2, family.times, -1), axis=2) / size
    axes[0].plot(family.t, gap.mean(axis=0), "o-", label=name)
axes[0].set(xlabel="time", ylabel="relative error", title="Error of the frames")
axes[0].legend()
axes[1].semilogy(trained.state.loss, label="mean squared residual")
axes[1].semilogy(trained.state.tolerance, label="inner tolerance")
axes[1].set(xlabel="step", title="Training")
axes[1].legend()
plt.show()
