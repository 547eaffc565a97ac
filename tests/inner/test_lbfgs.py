"""L-BFGS products against the dense formula, on the free variables, without bad pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner.lbfgs import add_pair, inverse_product, no_pairs

N, MEMORY = 6, 4
RNG = np.random.default_rng(5)
ROOT = RNG.normal(size=(N, N))
HESSIAN = ROOT.T @ ROOT + np.eye(N)
ALL = jnp.ones(N, bool)


def pairs_of(count, hessian=HESSIAN):
    steps = [RNG.normal(size=N) for _ in range(count)]
    return [(s, hessian @ s) for s in steps]


def stored(pairs, memory=MEMORY):
    kept = no_pairs(memory, jnp.zeros(N))
    for s, y in pairs:
        kept = add_pair(kept, jnp.asarray(s), jnp.asarray(y))
    return kept


def dense(pairs, free=None):
    """The inverse Hessian that BFGS updates give (Nocedal and Wright, equation 6.17), on the free
    variables, begun with `s.y / y.y` of the newest pair times the identity."""
    free = np.ones(N) if free is None else np.asarray(free, float)
    # Pairs that keep less than a fifth of their curvature on the free variables are left out.
    pairs = [(s * free, y * free) for s, y in pairs if (s * free) @ y >= 0.2 * (s @ y)]
    pairs = [(s, y) for s, y in pairs if s @ y > 0]
    if not pairs:
        return np.diag(free)
    s, y = pairs[-1]
    h = np.eye(N) * (s @ y) / (y @ y)
    for s, y in pairs:
        rho = 1 / (s @ y)
        v = np.eye(N) - rho * np.outer(s, y)
        h = v @ h @ v.T + rho * np.outer(s, s)
    return np.diag(free) @ h @ np.diag(free)


@pytest.mark.parametrize("count", [1, 3, MEMORY, 2 * MEMORY + 1])
@pytest.mark.parametrize("free", [ALL, jnp.arange(N) % 3 > 0])
def test_equals_the_dense_update_of_the_newest_pairs(count, free):
    pairs = pairs_of(count)
    product = jax.jit(inverse_product)
    expected = dense(pairs[-MEMORY:], free)
    for z in np.eye(N):
        found = product(stored(pairs), jnp.asarray(z), free)
        np.testing.assert_allclose(found, expected @ z, rtol=1e-10, atol=1e-12)


def test_satisfies_the_secant_equation_and_is_positive_definite():
    pairs = pairs_of(3)
    s, y = pairs[-1]
    np.testing.assert_allclose(inverse_product(stored(pairs), jnp.asarray(y), ALL), s, rtol=1e-10)
    for z in RNG.normal(size=(20, N)):
        assert z @ inverse_product(stored(pairs), jnp.asarray(z), ALL) > 0


def test_an_empty_memory_is_the_identity_on_the_free_variables():
    free = jnp.arange(N) > 2
    z = jnp.arange(1.0, N + 1)
    product = inverse_product(no_pairs(MEMORY, z), z, free)
    np.testing.assert_array_equal(product, jnp.where(free, z, 0))


def test_pairs_without_positive_curvature_are_left_out():
    good = pairs_of(2)
    s = RNG.normal(size=N)
    for y in (-s, np.zeros(N), np.linalg.qr(np.stack([s, good[0][1]]).T)[0][:, 1]):
        z = jnp.asarray(RNG.normal(size=N))
        with_bad = inverse_product(stored([good[0], (s, y), good[1]]), z, ALL)
        np.testing.assert_allclose(with_bad, dense(good) @ z, rtol=1e-10)
        # Also when the bad pair is the newest, which sets the scale otherwise.
        newest = inverse_product(stored([*good, (s, y)]), z, ALL)
        np.testing.assert_allclose(newest, dense(good) @ z, rtol=1e-10)


def test_curvature_on_the_free_variables_alone_decides():
    # s.y > 0 in all variables, but not on the free ones.
    s, y = np.ones(N), np.array([10.0, 1, 1, -2, -2, -2])
    free = jnp.arange(N) > 2
    z = jnp.asarray(RNG.normal(size=N))
    np.testing.assert_allclose(inverse_product(stored([(s, y)]), z, free), jnp.where(free, z, 0))


def test_a_pair_that_loses_its_curvature_on_the_free_variables_makes_no_long_step():
    # On the free variables 1e-3 of a curvature of 3 is left: as a pair it would ask for steps a
    # thousand times as long as those that the others are made of.
    free = jnp.arange(N) > 2
    s, y = np.ones(N), np.array([1.0, 1, 1, 1, 1, -1.999])
    good, z = pairs_of(1, np.eye(N)), jnp.ones(N)
    found = inverse_product(stored([*good, (s, y)]), z, free)
    np.testing.assert_allclose(found, jnp.where(free, 1.0, 0.0), rtol=1e-12)
