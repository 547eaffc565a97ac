"""Positive bases: known cosine measures, and rotations that are uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import cosine_measure, positive_basis, rotation

KEY = jax.random.key(0)
KNOWN = {"maximal": lambda n: n**-0.5, "minimal": lambda n: 1 / n}


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_cosine_measures_of_random_bases_are_the_known_ones(kind, n):
    for i in range(3):
        directions = positive_basis(jax.random.fold_in(KEY, i), n, kind)
        assert directions.shape == (2 * n if kind == "maximal" else n + 1, n)
        np.testing.assert_allclose(jnp.linalg.norm(directions, axis=1), 1, rtol=1e-14)
        # Systems of n equations whose condition is about n.
        assert cosine_measure(directions) == pytest.approx(KNOWN[kind](n), rel=1e-12)
        # Their lengths do not count, nor further directions of the same.
        scaled = directions * jnp.arange(1.0, 1 + len(directions))[:, None]
        assert cosine_measure(scaled) == pytest.approx(KNOWN[kind](n), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_cosine_measure_of_an_uneven_basis(n):
    # Unit vectors and the opposite of their sum: Jarry-Bolduc, Nadeau, Singh (2020).
    d = np.concatenate([np.eye(n), -np.ones((1, n))])
    assert cosine_measure(d) == pytest.approx((n**2 + 2 * (n - 1) * n**0.5) ** -0.5, rel=1e-12)


def test_cosine_measure_is_that_of_its_definition():
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 20_001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for _ in range(20):
        d = random.normal(size=(7, 2))
        unit = d / np.linalg.norm(d, axis=1, keepdims=True)
        worst = (unit @ circle).max(axis=0).min()
        if worst <= 0.01:
            continue
        # The grid misses the worst angle by at most half of its width.
        assert worst - np.pi / 20_000 <= cosine_measure(d) <= worst + 1e-12
    # In three dimensions, from above by sampling.
    d = random.normal(size=(9, 3))
    sphere = random.normal(size=(3, 200_000))
    sphere /= np.linalg.norm(sphere, axis=0)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    worst = (unit @ sphere).max(axis=0).min()
    assert worst - 0.02 <= cosine_measure(d) <= worst


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (np.eye(3), "do not span positively"),
        (np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), "do not span positively"),
        (np.array([[1.0, 0.0], [-1.0, 0.0]]), "do not span positively"),
        (np.zeros((3, 2)), "a zero row"),
        (np.full((3, 2), np.nan), "finite numbers"),
        (np.tile(np.eye(20), (3, 1)), "more than 200000 are not tried"),
    ],
)
def test_sets_without_a_cosine_measure(directions, message):
    with pytest.raises(ValueError, match=message):
        cosine_measure(directions)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rotations_are_orthogonal_and_uniform(dtype):
    n, count = 3, 20_000
    keys = jax.random.split(KEY, count)
    q = jax.vmap(lambda key: rotation(key, n, dtype))(keys)
    assert q.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(q @ q.mT, np.broadcast_to(np.eye(n), q.shape), atol=20 * eps)
    # Under Haar measure entries have mean 0, variance 1/n, fourth moment 3 / (n (n + 2)); the trace
    # has mean 0 and variance 1; both determinants are as likely. Five standard errors.
    error = 5 * count**-0.5
    assert np.abs(np.mean(q, axis=0)).max() < error * n**-0.5
    np.testing.assert_allclose(np.mean(q**2, axis=0), 1 / n, atol=error * 0.3)
    np.testing.assert_allclose(np.mean(q**4, axis=0), 3 / (n * (n + 2)), atol=error * 0.3)
    trace = np.trace(q, axis1=1, axis2=2)
    assert abs(trace.mean()) < error
    assert abs(trace.var() - 1) < 2 * error
    assert abs(np.linalg.det(q).mean()) < error


def test_bases_that_cannot_be_made():
    with pytest.raises(ValueError, match="at least 1 dimension"):
        positive_basis(KEY, 0)
    with pytest.raises(ValueError, match="kind is 'middle'"):
        positive_basis(KEY, 2, "middle")
    maximal = positive_basis(KEY, 4)
    np.testing.assert_array_equal(maximal[4:], -maximal[:4])
    assert positive_basis(KEY, 4, dtype=jnp.float32).dtype == jnp.float32
