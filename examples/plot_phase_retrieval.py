"""
Phase retrieval on a sphere
===========================

A signal of norm 1 is seen only through the squares of linear measurements: signs are lost. The
misfit has many local minima. Consensus hopping keeps to the sphere by putting every point back on
it, and uses values alone.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.solvers import ConsensusHopping, Sphere

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
D, MOST = 16, 4

# %%
# One signal
# ----------
#
# Sixteen entries, two measurements for each. Minus the signal has the same squares, so the sign of
# the result is chosen afterwards.

grid = jnp.linspace(-1, 1, D)
signal = jnp.exp(-8 * (grid + 0.4) ** 2) - 0.7 * jnp.exp(-20 * (grid - 0.4) ** 2)
signal = signal / jnp.linalg.norm(signal)


def instance(key, ratio, truth):
    """The misfit to `ratio` measurements an entry, and a start at random on the sphere."""
    one, two = jax.random.split(key)
    A = jax.random.normal(one, (MOST * D, D))
    seen = (A @ truth) ** 2
    # Arrays of one size for all ratios, so that one compiled program serves them.
    used = jnp.arange(MOST * D) < ratio * D
    start = jax.random.normal(two, (D,))

    def misfit(x):
        return jnp.mean(((A @ x) ** 2 - seen) ** 2, where=used)

    return misfit, start / jnp.linalg.norm(start)


on_sphere = ConsensusHopping(retract=Sphere(), spread=0.5)
by_gradient = tolerax.InexactLineSearch()
misfit, start = instance(jax.random.key(1), 2, signal)
problem = tolerax.Objective(misfit)
found = {
    "hopping on the sphere": tolerax.solve(problem, on_sphere, start),
    "line search": tolerax.solve(problem, by_gradient, start),
}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, (name, solution) in zip(axes, found.items(), strict=True):
    x = solution.x * jnp.sign(solution.x @ signal)
    ax.plot(grid, signal, color="black", linestyle="--", label="signal")
    ax.plot(grid, x, "o-", color="tab:orange", markersize=4, label=name)
    ax.legend(loc="upper right", fontsize=8)
    print(
        f"{name}: misfit {solution.value:.1e}, norm {jnp.linalg.norm(x):.6f}, "
        f"error {jnp.linalg.norm(x - signal):.1e}, {int(solution.work.values):,} values"
    )
figure.tight_layout()
plt.show()

# %%
# How many measurements does it take?
# -----------------------------------
#
# Signals, measurements and starts at random; the signal counts as found where the error is below
# 1 %. Hopping finds more of them than a line search from the same start. It also takes hundreds of
# times more values, so the line search may try again: with five starts, of which the lowest misfit
# counts, it is the better method. Where there is a gradient, use it.

ratios = (2,) if SMALL else (2, 3, 4)
runs = 2 if SMALL else 20
STARTS = 5


def error(x, truth):
    return jnp.minimum(jnp.linalg.norm(x - truth), jnp.linalg.norm(x + truth))


@jax.jit
def many(ratio):
    """Whether the signal was found, for each run and method."""

    def one(key):
        drawn, made, hops, starts = jax.random.split(key, 4)
        truth = jax.random.normal(drawn, (D,))
        truth = truth / jnp.linalg.norm(truth)
        misfit, x0 = instance(made, ratio, truth)
        problem = tolerax.Objective(misfit)
        hopping = tolerax.solve(problem, on_sphere, x0, key=hops, max_steps=500)
        others = jax.random.normal(starts, (STARTS, D))
        others = (others / jnp.linalg.norm(others, axis=1)[:, None]).at[0].set(x0)
        searched = jax.vmap(lambda x: tolerax.solve(problem, by_gradient, x, max_steps=300))(others)
        best = searched.x[jnp.argmin(searched.value)]
        points = jnp.stack([hopping.x, searched.x[0], best])
        return jax.vmap(lambda x: error(x, truth) < 0.01)(points)

    return jax.vmap(one)(jax.random.split(jax.random.key(2), runs))


rates = np.array([np.asarray(many(ratio)).mean(axis=0) for ratio in ratios])
names = ("hopping on the sphere", "line search", f"line search, {STARTS} starts")
figure, ax = plt.subplots(figsize=(5.5, 3.6))
for name, column, style in zip(names, rates.T, ("o-", "s--", "^:"), strict=True):
    ax.plot(ratios, column, style, label=name)
    print(f"{name}: " + ", ".join(f"{r:.2f}" for r in column))
ax.set_xlabel("measurements an entry")
ax.set_ylabel("share of signals found")
ax.set_xticks(ratios)
ax.set_ylim(-0.03, 1.03)
ax.legend(fontsize=8)
figure.tight_layout()
plt.show()
