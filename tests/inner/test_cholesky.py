"""Inverse Cholesky factors, in blocks of columns."""

import jax
import jax.numpy as jnp
import numpy as np

from tolerax.inner.cholesky import BLOCK, inverse_factor


def test_inverse_factors_whiten_and_failures_stay_in_their_lane():
    n = 2 * BLOCK + 5
    A = np.random.default_rng(0).standard_normal((3, 2 * n, n))
    G = np.einsum("kmi,kmj->kij", A, A)
    condition = np.linalg.cond(G).max()
    G[1] -= 1.5 * np.linalg.eigvalsh(G[1])[0] * np.eye(n)
    inverse = np.asarray(jax.jit(inverse_factor)(jnp.asarray(G)))
    assert not np.all(np.isfinite(inverse[1]))
    for k in (0, 2):
        assert np.array_equal(inverse[k], np.tril(inverse[k]))
        # An inverse is right to rounding times the number of rows and the condition.
        error = np.abs(inverse[k] @ G[k] @ inverse[k].T - np.eye(n)).max()
        assert error <= n * np.finfo(float).eps * condition


def test_small_matrices_are_left_to_the_library():
    G = jnp.array([[[4.0, 2.0], [2.0, 3.0]]])
    L = np.linalg.cholesky(np.asarray(G))
    np.testing.assert_allclose(inverse_factor(G), np.linalg.inv(L), rtol=1e-14, atol=1e-15)
