"""Models through values, their minimum in a ball and a box, and the distribution that evolves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner.evolution import Evolution, agreement, features, fitted
from tolerax.inner.interpolation import basis
from tolerax.inner.trust_region import in_ball_and_box

RNG = np.random.default_rng(0)
N = 3
POINTS = jnp.asarray(RNG.normal(size=(10, N)))
HESSIAN = jnp.asarray([[2.0, 1.0, 0.0], [1.0, -1.0, 0.5], [0.0, 0.5, 3.0]])


def quadratic(x):
    return 1 + x @ jnp.arange(1.0, N + 1) + 0.5 * x @ HESSIAN @ x


VALUES = jax.vmap(quadratic)(POINTS)


def test_all_points_determine_a_quadratic():
    """Ten points in three dimensions: whatever Hessian is preferred."""
    q = basis(POINTS, jnp.ones(10, bool)).model(VALUES, jnp.eye(N))
    np.testing.assert_allclose(q.H, HESSIAN, atol=1e-9)
    np.testing.assert_allclose(q.g, jnp.arange(1.0, N + 1), atol=1e-9)


def test_few_points_leave_the_nearest_hessian():
    """Interpolation holds at the points that count; no change of the Hessian that keeps it is
    nearer to the one preferred."""
    mask = jnp.arange(10) < 7
    q = basis(POINTS, mask).model(VALUES, jnp.eye(N))
    np.testing.assert_allclose(jax.vmap(q)(POINTS[:7]), VALUES[:7], atol=1e-9)
    np.testing.assert_allclose(q.H, q.H.T, atol=1e-12)
    # The true Hessian interpolates too, so the nearest one is nearer.
    assert jnp.linalg.norm(q.H - jnp.eye(N)) < jnp.linalg.norm(HESSIAN - jnp.eye(N))
    again = basis(POINTS, mask).model(VALUES, HESSIAN)
    np.testing.assert_allclose(again.H, HESSIAN, atol=1e-9)


def test_lagrange_functions_are_1_at_their_point():
    mask = jnp.arange(10) < 7
    shared = basis(POINTS, mask)
    one = shared.lagrange(2)
    np.testing.assert_allclose(jax.vmap(one)(POINTS[:7]), np.eye(10)[2, :7], atol=1e-9)
    s = jnp.array([0.3, -0.2, 0.5])
    at = shared.lagrange_at(s)
    np.testing.assert_allclose(at[2], one(s), atol=1e-9)
    np.testing.assert_allclose(jnp.sum(at), 1, atol=1e-9)


@pytest.mark.parametrize("definite", [True, False])
def test_the_step_is_as_low_as_sampled_ones(definite):
    """Among 20,000 random points of ball and box none is lower by more than 2 in 100 where the box
    is wide; where it is tight steps are feasible and lower the quadratic."""
    find = jax.jit(in_ball_and_box)
    for seed in range(10):
        random = np.random.default_rng(seed)
        a = random.normal(size=(N, N))
        H = a @ a.T if definite else a + a.T
        g, wide = random.normal(size=N), seed % 2 == 0
        low, high = (-9 * np.ones(N), 9 * np.ones(N)) if wide else -random.uniform(0, 1, (2, N))
        high = np.abs(high)
        s = np.asarray(find(*map(jnp.asarray, (g, H, 1.0, low, high))))
        q = lambda s, g=g, H=H: s @ g + 0.5 * np.sum((s @ H) * s, axis=-1)  # noqa: E731
        assert np.all((s >= low) & (s <= high))
        assert np.linalg.norm(s) <= 1 + 1e-12
        sample = random.normal(size=(20_000, N))
        sample /= np.maximum(np.linalg.norm(sample, axis=1, keepdims=True), 1e-12)
        sample *= random.uniform(size=(20_000, 1)) ** (1 / N)
        lowest = q(np.clip(sample, low, high)).min()
        assert q(s) <= (0.98 * lowest if wide else 0)


def test_a_fit_of_a_quadratic_is_exact_and_ranks():
    points = jnp.asarray(RNG.normal(size=(30, N)))
    values = jax.vmap(quadratic)(points)
    fit = fitted(points, values, jnp.ones(30, bool))
    said = features(POINTS) @ fit
    # Up to a constant, and to the ridge of 1e-8 on curvatures.
    np.testing.assert_allclose(said - said[0], VALUES - VALUES[0], atol=1e-5)
    assert float(agreement(said, VALUES, jnp.ones(10, bool))) == 1
    assert float(agreement(said, -VALUES, jnp.ones(10, bool))) == -1


def test_the_distribution_finds_an_ellipse():
    """Of condition 100, from a distance of 5: to 1e-6 within 250 generations of 10."""
    scale = jnp.array([1.0, 10.0, 3.0])

    def generation(now, key):
        x = now.sample(key, 10)
        return now.updated(x, jnp.sum((scale[None] * x) ** 2, axis=1)), None

    first = Evolution.of(jnp.full(N, 3.0), jnp.array(1.0))
    last, _ = jax.lax.scan(generation, first, jax.random.split(jax.random.key(0), 250))
    np.testing.assert_allclose(last.mean, 0, atol=1e-6)
    z = last.whitened(last.coloured(POINTS))
    np.testing.assert_allclose(z, POINTS, atol=1e-6)
