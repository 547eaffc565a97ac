"""
Particles that agree
====================

Rastrigin's function has a local minimum in every unit square. Particles of consensus-based
optimization spread over many of them, agree on the best, and contract.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.solvers import CBO

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
OPTIMUM = np.array([1.2, -0.7])


def rastrigin(x):
    z = x - OPTIMUM
    return jnp.mean(z**2 - 10 * jnp.cos(2 * jnp.pi * z) + 10)


# %%
# The particles of a run
# ----------------------
#
# A callback sees the points of every question. The stars are the minimum, the dots the particles.

seen = []
problem = tolerax.Objective(rastrigin, bounds=(-3.0, 3.0))
solution = tolerax.solve(
    problem,
    CBO(particles=60),
    jnp.array([-2.0, 2.0]),
    key=jax.random.key(4),
    max_steps=300,
    callback=lambda step: seen.append(np.asarray(step.query.x)),
)
print(solution.summary())

grid = np.linspace(-3, 3, 201)
heights = jax.vmap(jax.vmap(rastrigin))(jnp.stack(jnp.meshgrid(grid, grid), axis=-1))
figure, axes = plt.subplots(2, 2, figsize=(7, 7), sharex=True, sharey=True)
for ax, k in zip(axes.flat, (0, 5, 12, 30), strict=True):
    ax.contourf(grid, grid, heights, levels=20, cmap="Blues_r")
    ax.plot(*seen[min(k, len(seen) - 1)].T, ".", color="tab:orange", markersize=5)
    ax.plot(*OPTIMUM, "*", color="white", markersize=12, markeredgecolor="black")
    ax.set_title(f"step {k}")
    ax.set_aspect("equal")
figure.tight_layout()
plt.show()

# %%
# Twenty dimensions
# -----------------
#
# The number of local minima grows as 7 to the power of d; the number of steps grows far slower.
# Runs with different keys are one compiled program.

runs = 4 if SMALL else 20
figure, ax = plt.subplots(figsize=(6, 4))
for d in (2, 10) if SMALL else (2, 10, 20):
    shifted = tolerax.Objective(
        lambda x: jnp.mean((x - 1) ** 2 - 10 * jnp.cos(2 * jnp.pi * (x - 1)) + 10),
        bounds=(-3.0, 3.0),
    )
    many = jax.vmap(
        lambda key, p=shifted, d=d: tolerax.solve(
            p, CBO(tol=1e-3), jnp.full(d, -2.0), key=key, max_steps=1500
        )
    )(jax.random.split(jax.random.key(0), runs))
    found = np.max(np.abs(np.asarray(many.x) - 1), axis=1) < 0.25
    print(f"d = {d}: {found.sum()} of {runs} runs, {np.median(many.steps):.0f} steps each")
    best = np.asarray(many.history.best_value)
    counts = np.arange(best.shape[1])[None] < np.asarray(many.steps)[:, None]
    middle = np.nanmedian(np.where(counts, best, np.nan)[:, : int(np.median(many.steps))], axis=0)
    ax.semilogy(np.maximum(middle, 1e-12), label=f"d = {d}")
ax.set_xlabel("steps of 100 particles")
ax.set_ylabel("best value (median)")
ax.legend()
figure.tight_layout()
plt.show()

# %%
# On a sphere
# -----------
#
# Every particle is put back on a set after each step. The smallest value of a quadratic form on the
# sphere is its smallest eigenvalue.

from tolerax.solvers import Sphere

rng = np.random.default_rng(0)
A = rng.normal(size=(12, 12))
A = jnp.asarray((A + A.T) / 2)
form = tolerax.Objective(lambda x: x @ A @ x)
on_sphere = tolerax.solve(form, CBO(retract=Sphere()), jnp.ones(12) / np.sqrt(12), max_steps=1500)
print(f"smallest eigenvalue {np.linalg.eigvalsh(A)[0]:.6f}, found {on_sphere.value:.6f}")
