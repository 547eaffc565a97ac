"""Runs of `CBO` without noise against the equations of its drifts, and its noise cut off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import CBO, Objective
from tolerax.solvers import Anisotropic, Isotropic, SoftConsensus, Stiefel

ALPHA, H = 3.0, 0.1
STILL = Anisotropic(0.0, jumps=None)


def heights(x):
    return np.sum((x - 1) ** 2, axis=1) + np.cos(3 * x[:, 0])


def slopes(x):
    return 2 * (x - 1) - 3 * np.sin(3 * x[:, :1]) * np.array([1.0, 0.0])


def expected(x, steps, memory=0.0, gradient=0.0, growth=1.0, remembers=False):
    """The first points of the equations, by NumPy."""
    found, anchor = [x], x
    for k in range(steps):
        held = heights(x) < heights(anchor)
        anchor = np.where(held[:, None], x, anchor) if remembers else x
        weights = np.exp(-ALPHA * growth**k * (heights(anchor) - heights(anchor).min()))
        m = weights @ anchor / weights.sum()
        x = x - H * (x - m) - H * memory * (x - anchor) - H * gradient * slopes(x)
        found.append(x)
    return np.stack(found)


@pytest.mark.parametrize(
    "parts",
    [{}, {"gradient": 0.7}, {"memory": 2.0}, {"growth": 1.5}, {"memory": 2.0, "gradient": 5.0}],
    ids=str,
)
def test_drifts_are_those_of_the_equations(parts):
    start = np.random.default_rng(0).normal(size=(8, 2)) * 2
    growth = parts.get("growth", 1.0)
    solver = CBO(
        particles=8,
        consensus=SoftConsensus(ALPHA, growth=growth, standardized=False),
        noise=STILL,
        ensemble=jnp.asarray(start),
        dt=H,
        **{name: parts[name] for name in ("memory", "gradient") if name in parts},
    )
    problem = Objective(lambda x: jnp.sum((x - 1) ** 2) + jnp.cos(3 * x[0]))
    seen = []
    tolerax.solve(
        problem,
        solver,
        jnp.zeros(2),
        max_steps=5,
        callback=lambda step: seen.append(np.asarray(step.query.x)),
    )
    truth = expected(start, 4, remembers="memory" in parts, **parts)
    np.testing.assert_allclose(np.stack(seen), truth, rtol=1e-12, atol=1e-12)
    if "memory" in parts:
        # Some particle is higher than where it was: the memory has something to say.
        assert np.any(heights(truth[-2]) > np.min([heights(x) for x in truth[:-2]], axis=0))


def test_noise_is_cut_off_where_it_is_asked_to_be():
    n, s, most = 100_000, 0.5, 0.3
    u = jnp.broadcast_to(jnp.array([[2.0, -0.1]]), (n, 2))
    key, scale, w = jax.random.key(0), jnp.ones(2), jnp.full(n, 1 / n)
    moved = Anisotropic(s, jumps=None, truncated=most)(key, u, u, scale, w, None)
    # Five standard errors of a standard deviation.
    tolerance = 5 / np.sqrt(2 * n)
    np.testing.assert_allclose(np.std(moved, axis=0), [s * most, s * 0.1], rtol=tolerance)
    moved = Isotropic(s, truncated=most)(key, u, u, scale, w, None)
    np.testing.assert_allclose(np.std(moved, axis=0), s * most, rtol=tolerance)


def test_matrices_keep_orthonormal_columns_and_span_the_lowest_eigenvectors():
    A = np.random.default_rng(1).normal(size=(5, 5))
    A = jnp.asarray(A + A.T)
    problem = Objective(lambda x: jnp.trace(x.T @ A @ x))
    grams = []

    def note(step):
        x = np.asarray(step.query.x)
        grams.append(np.einsum("kni,knj->kij", x, x))

    solution = tolerax.solve(
        problem, CBO(retract=Stiefel()), jnp.eye(5, 2), max_steps=800, callback=note
    )
    grams = np.concatenate(grams)
    np.testing.assert_allclose(grams, np.broadcast_to(np.eye(2), grams.shape), atol=1e-12)
    lowest = np.linalg.eigvalsh(A)[:2].sum()
    # An angle of tol = 1e-4 costs its square times the spread of the eigenvalues.
    np.testing.assert_allclose(solution.value, lowest, atol=1e-3)
