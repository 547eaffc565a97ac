"""Random numbers are those of `jax.random`, bit for bit, and normal where those are not exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tolerax.inner.noise import APART, _gaussian, bits, fold_in, normal, threefry, uniform
from tolerax.inner.particles import when

KEY = jax.random.key(7)


def test_the_hash_is_the_published_one():
    """The test vectors of the authors' Random123 for Threefry-2x32 with 20 rounds."""
    vectors = (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    )
    for key, counter, words in vectors:
        found = threefry(jnp.array(key, jnp.uint32), *jnp.array(counter, jnp.uint32))
        assert tuple(int(word) for word in found) == words


def test_words_keys_and_uniform_numbers_are_those_of_jax():
    counter = jnp.arange(300, dtype=jnp.uint32)
    np.testing.assert_array_equal(bits(KEY, counter), jax.random.bits(KEY, (300,), jnp.uint32))
    np.testing.assert_array_equal(uniform(KEY, 300), jax.random.uniform(KEY, (300,), jnp.float32))
    for number in (0, 5, 2**31 - 1):
        folded = jax.random.key_data(jax.random.fold_in(KEY, number))
        np.testing.assert_array_equal(jax.random.key_data(fold_in(KEY, number)), folded)
    split = jax.random.key_data(jax.random.split(KEY, 3))
    mine = jnp.stack([jax.random.key_data(fold_in(KEY, i)) for i in range(3)])
    np.testing.assert_array_equal(mine, split)


@pytest.mark.parametrize("shape", [(3, 3), (APART, 2), (APART + 1, 3)])
def test_normal_numbers_are_those_of_jax(shape):
    """Drawn at once, in halves, of odd number; for many keys; in blocks of a sharded array."""
    expected = jax.random.normal(KEY, shape, jnp.float32)
    for dtype in (jnp.float32, jnp.float64):
        found = normal(KEY, jnp.zeros(shape, dtype))
        assert found.dtype == dtype
        # Fused code may contract a multiplication and a sum: one bit in the last place or two.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    keys = jax.random.split(KEY, 2)
    many = jax.vmap(lambda key: normal(key, jnp.zeros(shape)))(keys)
    np.testing.assert_allclose(many[1], normal(keys[1], jnp.zeros(shape)), rtol=1e-6, atol=1e-7)
    mesh = jax.make_mesh((1,), ("particles",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("particles"))
    spread = jax.jit(lambda x: normal(KEY, x, over))(jnp.zeros(shape))
    np.testing.assert_allclose(spread, expected, rtol=1e-6, atol=1e-7)


def test_normal_numbers_are_normal_to_the_tails():
    """At equally spaced words the inverse distribution function, to what float32 resolves; the
    largest number is that of a word in 2^23."""
    words = jnp.arange(0, 2**32, 65_537, dtype=jnp.uint32)
    exact = scipy.stats.norm.ppf((np.floor(np.asarray(words) / 512) + 0.5) / 2**23)
    # Uniform numbers are rounded to 2^-24: where the density is small that moves them far.
    moved = 2.0**-23 / scipy.stats.norm.pdf(exact)
    assert np.all(np.abs(np.asarray(_gaussian(words)) - exact) < 1e-5 + moved)
    x = np.asarray(normal(KEY, jnp.zeros((1000, 1000)))).ravel()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    # Standard errors of the moments of a million: 1e-3, 1.4e-3, 2.4e-3 and 4.9e-3.
    moments = np.mean(x), np.var(x) - 1, scipy.stats.skew(x), scipy.stats.kurtosis(x)
    assert np.all(np.abs(moments) < 4 * np.array([1e-3, 1.4e-3, 2.4e-3, 4.9e-3]))
    assert 4.4 < np.max(np.abs(x)) < 5.5
    # Neighbours and next steps are uncorrelated.
    y = np.asarray(normal(fold_in(KEY, 1), jnp.zeros((1000, 1000)))).ravel()
    assert np.abs(np.mean(x * y)) < 4e-3
    assert np.abs(np.mean(x[1:] * x[:-1])) < 4e-3


def test_other_generators_are_accepted():
    key = jax.random.key(0, impl="rbg")
    x = normal(key, jnp.zeros((100, 50)))
    assert np.std(x) == pytest.approx(1, abs=0.05)
    assert not np.array_equal(x, normal(fold_in(key, 1), jnp.zeros((100, 50))))


def test_a_change_is_made_when_it_is_due():
    double = lambda x, now: jnp.where(now, 2 * x, jnp.nan)  # noqa: E731
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(when(jnp.array(False), double, x), x)
    flags = jnp.array([True, False])
    both = jax.vmap(lambda flag: when(flag, double, x))(flags)
    np.testing.assert_array_equal(both, [2 * x, x])
