"""
An inverse problem without derivatives
======================================

How permeable is a medium, given its pressure at a few points? Ensemble Kalman inversion runs the
simulator forward only, and returns an ensemble: an estimate with its uncertainty. A Markov chain
shows how far that uncertainty can be trusted.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.solvers import EnsembleKalmanInversion

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
CELLS, MODES = 64, 12

# %%
# The simulator
# -------------
#
# Pressure p in a medium of permeability a obeys (a p')' = -10 on (0, 1), with p = 0 at both ends:
# finite volumes with 64 cells. The logarithm of a is a sum of twelve cosines, whose coefficients x
# are independent and standard normal: that is the prior.

centres = (jnp.arange(CELLS) + 0.5) / CELLS
modes = jnp.arange(1, MODES + 1)
basis = jnp.cos(jnp.pi * modes * centres[:, None]) * 1.2 / modes


def pressure(x):
    a = jnp.exp(basis @ x)
    faces = 2 / (1 / a[1:] + 1 / a[:-1])
    left, right = jnp.append(2 * a[:1], faces), jnp.append(faces, 2 * a[-1:])
    lower, upper = jnp.append(0.0, -faces), jnp.append(-faces, 0.0)
    source = jnp.full((CELLS, 1), 10.0 / CELLS**2)
    return jax.lax.linalg.tridiagonal_solve(lower, left + right, upper, source)[:, 0]


# %%
# Data
# ----
#
# Eleven measurements with noise of 2 % of the largest pressure. Residuals are counted in standard
# deviations of the noise.

rng = np.random.default_rng(3)
truth = jnp.asarray(rng.normal(size=MODES))
places = jnp.arange(3, CELLS, 6)
noise = 0.02 * float(jnp.max(pressure(truth)))
data = pressure(truth)[places] + noise * jnp.asarray(rng.normal(size=places.size))


def residuals(x):
    return (pressure(x)[places] - data) / noise


# %%
# The inversion
# -------------
#
# The first ensemble is a sample of the prior. With ``posterior=True`` the run ends where it is a
# sample of the posterior, as far as normal distributions can say.

solver = EnsembleKalmanInversion(particles=200, posterior=True)
solution = tolerax.solve(
    tolerax.LeastSquares(residuals), solver, jnp.zeros(MODES), key=jax.random.key(1)
)
print(solution.summary())
ensemble = solution.state.solver_state.ensemble

# %%
# The truth about the posterior
# -----------------------------
#
# A Markov chain that leaves the prior as it is and accepts by the residuals (preconditioned
# Crank-Nicolson) has the posterior as its limit: 50 chains, begun in the ensemble.

SKIPPED, KEPT = (50, 200) if SMALL else (2000, 8000)
RHO = 0.1


def misfit(x):
    return 0.5 * jnp.sum(residuals(x) ** 2)


@jax.jit
def chains(x, key):
    def step(carry, key):
        x, energy = carry
        propose, accept = jax.random.split(key)
        new = jnp.sqrt(1 - RHO**2) * x + RHO * jax.random.normal(propose, x.shape)
        new_energy = jax.vmap(misfit)(new)
        ok = jnp.log(jax.random.uniform(accept, energy.shape)) < energy - new_energy
        x, energy = jnp.where(ok[:, None], new, x), jnp.where(ok, new_energy, energy)
        return (x, energy), x

    start = (x, jax.vmap(misfit)(x))
    return jax.lax.scan(step, start, jax.random.split(key, SKIPPED + KEPT))[1][SKIPPED:]


chain = np.asarray(chains(ensemble[:50], jax.random.key(2))).reshape(-1, MODES)

spread = np.std(np.asarray(ensemble), axis=0)
exact = np.std(chain, axis=0)
shift = np.abs(np.mean(np.asarray(ensemble), axis=0) - chain.mean(axis=0)) / exact
print(f"model runs: inversion {int(solution.work.points):,}, chains {50 * (SKIPPED + KEPT):,}")
print(
    "standard deviations, inversion over chains: "
    f"{np.min(spread / exact):.2f} to {np.max(spread / exact):.2f}"
)
print(f"means differ by up to {np.max(shift):.2f} standard deviations")

# %%
# The first panel shows the permeability with bands of two standard deviations, the second the
# pressure. In the third: where the data say little, the spread is that of the prior (1), and both
# methods agree on where that is.

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
ax = axes[0]
for x, color, name in ((ensemble, "tab:orange", "inversion"), (chain[::20], "gray", "chains")):
    fields = np.asarray(x) @ np.asarray(basis).T
    m, s = fields.mean(axis=0), fields.std(axis=0)
    ax.fill_between(centres, m - 2 * s, m + 2 * s, color=color, alpha=0.3, label=name)
    ax.plot(centres, m, color=color)
ax.plot(centres, basis @ truth, color="black", linestyle="--", label="truth")
ax.set_title("log of the permeability")
ax.legend(fontsize=8)
ax = axes[1]
ax.plot(centres, np.asarray(jax.vmap(pressure)(ensemble[:40])).T, color="tab:orange", alpha=0.2)
ax.plot(centres, pressure(truth), color="black", linestyle="--")
ax.errorbar(centres[places], data, 2 * noise, fmt="o", color="tab:blue", markersize=4)
ax.set_title("pressure: ensemble, truth, data")
ax = axes[2]
ax.plot(modes, exact, "o-", color="gray", label="chains")
ax.plot(modes, spread, "o-", color="tab:orange", label="inversion")
ax.axhline(1, color="black", linestyle=":", label="prior")
ax.set_ylim(0, 1.2)
ax.set_title("standard deviation of each coefficient")
ax.set_xlabel("mode")
ax.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %%
# Too few particles
# -----------------
#
# The ensemble stays in the span of the first one, and small ensembles have correlations that mean
# nothing, which the method takes for information: the spread comes out too small. The mean over
# runs of the ratio of standard deviations says by how much.

problem = tolerax.LeastSquares(residuals)
for particles in (10,) if SMALL else (10, 20, 50, 200):
    small = EnsembleKalmanInversion(particles=particles, posterior=True)

    def ratio(key, small=small):
        run = tolerax.solve(problem, small, jnp.zeros(MODES), key=key, max_steps=100)
        return jnp.std(run.state.solver_state.x, axis=0) / exact

    ratios = jax.vmap(ratio)(jax.random.split(jax.random.key(3), 2 if SMALL else 10))
    print(f"{particles:4d} particles: spread is {np.mean(ratios):.2f} of that of the chains")
