"""Solves with many small symmetric matrices."""

import jax.numpy as jnp
import numpy as np

from tolerax.inner.normal_equations import factored

LANES, N = 40, 4


def test_a_matrix_that_is_indefinite_and_well_conditioned_is_solved_and_says_so():
    rng = np.random.default_rng(1)
    V = np.linalg.qr(rng.normal(size=(N, N)))[0]
    H = V * np.array([3.0, 2.0, 1.0, -0.5])[None] @ V.T
    singular = V * np.array([3.0, 2.0, 1.0, 0.0])[None] @ V.T
    b = rng.normal(size=(2, N))
    solve, sound = factored(jnp.asarray(np.stack([H, singular])))
    assert sound.tolist() == [True, False]
    np.testing.assert_allclose(H @ np.asarray(solve(jnp.asarray(b)))[0], b[0], rtol=1e-12)


def test_a_direction_without_curvature_is_left_out_whatever_rounding_makes_of_it():
    """Gram matrices of rank 3, whose last pivot is rounding of either sign; and of rank 4."""
    rng = np.random.default_rng(0)
    J = rng.normal(size=(LANES, 6, N))
    null = rng.normal(size=(LANES, N))
    J[1:, :, 3] = -(np.einsum("kmi,ki->km", J, null)[1:] / null[1:, 3:] - J[1:, :, 3])
    H = np.einsum("kmi,kmj->kij", J, J)
    b = rng.normal(size=(LANES, N))
    q = np.asarray(factored(jnp.asarray(H))[0](jnp.asarray(b)))
    np.testing.assert_allclose(H[0] @ q[0], b[0], rtol=1e-10)
    # What is left of b is its part along the null vector, in the scaled variables.
    scale = np.sqrt(np.einsum("kii->ki", H))
    along = scale * null / np.linalg.norm(scale * null, axis=1, keepdims=True)
    part = scale * along * np.sum(along * b / scale, axis=1, keepdims=True)
    left = b - np.einsum("kij,kj->ki", H, q)
    np.testing.assert_allclose(left[1:], part[1:], rtol=1e-6, atol=1e-8)
    # Rounding taken for curvature would make q about 1e15.
    smallest = np.linalg.eigvalsh(H[1:])[:, 1]
    assert np.all(np.linalg.norm(q[1:], axis=1) < 10 * np.linalg.norm(b[1:], axis=1) / smallest)
