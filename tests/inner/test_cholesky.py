"""Cholesky's method in blocks of columns."""

import jax
import jax.numpy as jnp
import numpy as np

from tolerax.inner.cholesky import BLOCK, cholesky


def test_factors_multiply_back_and_failures_stay_in_their_lane():
    n = 2 * BLOCK + 5
    A = np.random.default_rng(0).standard_normal((3, 2 * n, n))
    G = np.einsum("kmi,kmj->kij", A, A)
    G[1] -= 1.5 * np.linalg.eigvalsh(G[1])[0] * np.eye(n)
    L = np.asarray(jax.jit(cholesky)(jnp.asarray(G)))
    assert not np.all(np.isfinite(L[1]))
    for k in (0, 2):
        assert np.array_equal(L[k], np.tril(L[k]))
        # A factor is right to rounding times the number of rows.
        assert np.abs(L[k] @ L[k].T - G[k]).max() <= n * np.finfo(float).eps * np.abs(G[k]).max()


def test_small_matrices_are_left_to_the_library():
    G = jnp.array([[[4.0, 2.0], [2.0, 3.0]]])
    assert np.array_equal(cholesky(G), jnp.linalg.cholesky(G))
