"""
Hopping over ripples
====================

A canyon leads down to a minimum, and its walls and floor are rippled. Gradient descent sees the
ripples and stops in the first one. Consensus hopping sees the function on the scale of its cloud:
with a narrow cloud it is gradient descent, with a wide one it follows the canyon.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.solvers import ConsensusHopping, SoftConsensus

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
START = jnp.array([8.0, 8.0])


def floor(x1):
    return 1.5 * x1 - 4 * jnp.sin(x1 / 2.5)


def canyon(x):
    smooth = 4 * (x[1] - floor(x[0])) ** 2 + x[0] ** 2
    return smooth + 5 * jnp.sum(1 - jnp.cos(6 * x))


problem = tolerax.Objective(canyon)

# %%
# The scheme of the paper
# -----------------------
#
# A cloud of 200 points is drawn around the point, with standard deviation s; the next point is
# their mean with weights exp(-100 E). Gradient descent takes the step 0.005, which is stable here.


def hopping(s):
    soft = SoftConsensus(100.0, standardized=False)
    return ConsensusHopping(particles=200, consensus=soft, spread=s, shrink=1.0)


def path_of(solver, key):
    """The points between the hops."""
    points = [np.asarray(START)]
    tolerax.solve(
        problem,
        solver,
        START,
        key=key,
        max_steps=100,
        callback=lambda step: points.append(np.asarray(step.run.solver_state.x)),
    )
    return np.array(points)


def descend(x, _):
    return x - 0.005 * jax.grad(canyon)(x), x


_, descent = jax.lax.scan(descend, START, length=2000)
paths = {
    "gradient descent": np.asarray(descent),
    "hopping, s = 0.02": path_of(hopping(jnp.array(0.02)), jax.random.key(0)),
    "hopping, s = 0.7": path_of(hopping(jnp.array(0.7)), jax.random.key(0)),
}

first, second = np.linspace(-4, 10, 281), np.linspace(-6, 11, 341)
heights = jax.vmap(jax.vmap(canyon))(jnp.stack(jnp.meshgrid(first, second), axis=-1))
figure, axes = plt.subplots(1, 3, figsize=(10, 4.6), sharex=True, sharey=True)
for ax, (name, path) in zip(axes, paths.items(), strict=True):
    ax.contourf(first, second, np.log10(1 + heights), levels=24, cmap="Blues_r")
    ax.plot(*path.T, ".-", color="tab:orange", markersize=3, linewidth=1)
    ax.plot(*path[0], "o", color="tab:orange", markeredgecolor="black")
    ax.plot(0, 0, "*", color="white", markersize=12, markeredgecolor="black")
    ax.set_title(name)
    print(f"{name}: ends at distance {np.linalg.norm(path[-1]):.2f} from the minimum")
figure.tight_layout()
plt.show()

# %%
# How wide a cloud?
# -----------------
#
# The mean over runs of the distance after 100 hops. Below the width of a ripple nothing moves far;
# far above it the point follows the canyon, and ends as near to the minimum as the best of 200
# points in so wide a cloud.

widths = np.geomspace(0.02, 2.0, 6 if SMALL else 12)
keys = jax.random.split(jax.random.key(0), 5 if SMALL else 40)


@jax.jit
def distances(s):
    def one(key):
        solution = tolerax.solve(problem, hopping(s), START, key=key, max_steps=100)
        return jnp.linalg.norm(solution.state.solver_state.x)

    return jax.vmap(one)(keys)


found = np.array([distances(jnp.asarray(s)) for s in widths])
figure, ax = plt.subplots(figsize=(5.5, 3.6))
ax.fill_between(widths, found.min(axis=1), found.max(axis=1), alpha=0.2, color="tab:orange")
ax.plot(widths, found.mean(axis=1), "o-", color="tab:orange", label="hopping: mean and range")
ax.axhline(float(np.linalg.norm(descent[-1])), color="tab:blue", label="gradient descent")
ax.set_xscale("log")
ax.set_xlabel("width s of the cloud")
ax.set_ylabel("distance from the minimum")
ax.legend()
figure.tight_layout()
plt.show()

# %%
# A width that follows the hops
# -----------------------------
#
# By default the width is adapted: it grows while hops go on in one direction and falls when they
# undo each other, and the run ends by itself.

default = jax.vmap(
    lambda key: tolerax.solve(problem, ConsensusHopping(particles=200), START, key=key)
)(keys)
away = np.linalg.norm(np.asarray(default.x), axis=1)
print(
    f"adapted width: {np.sum(away < 0.1)} of {len(keys)} runs end at the minimum, after "
    f"{np.median(default.steps):.0f} hops (median); largest distance {np.max(away):.2f}"
)
