"""Solves with many small symmetric matrices."""

import jax.numpy as jnp
import numpy as np

from tolerax.inner.normal_equations import factored

LANES, N = 40, 4


def test_a_direction_without_curvature_is_left_out_whatever_rounding_makes_of_it():
    """Gram matrices of rank 3, whose last pivot is rounding of either sign; and of rank 4."""
    rng = np.random.default_rng(0)
    J = rng.normal(size=(LANES, 6, N))
    J[1:, :, 1] = -J[1:, :, 0]
    H = np.einsum("kmi,kmj->kij", J, J)
    b = rng.normal(size=(LANES, N))
    q = np.asarray(factored(jnp.asarray(H))(jnp.asarray(b)))
    np.testing.assert_allclose(H[0] @ q[0], b[0], rtol=1e-10)
    # What is left of b is its part along the null vector (1, 1, 0, 0), in the scaled variables.
    left = b[1:] - np.einsum("kij,kj->ki", H[1:], q[1:])
    np.testing.assert_allclose(left[:, 2:], 0, atol=1e-10)
    np.testing.assert_allclose(left[:, 0], 0.5 * (b[1:, 0] + b[1:, 1]), rtol=1e-8, atol=1e-10)
    # Rounding taken for curvature would make q about 1e15.
    smallest = np.linalg.eigvalsh(H[1:])[:, 1]
    assert np.all(np.linalg.norm(q[1:], axis=1) < 10 * np.linalg.norm(b[1:], axis=1) / smallest)
