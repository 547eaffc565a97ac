"""Interpolation to the grid of half the spacing."""

import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import refine


def grid(n):
    return np.linspace(0, 1, n + 2)[1:-1]


@pytest.mark.parametrize("points", [2, 4, 6])
def test_polynomials_are_exact_up_to_the_boundary(points):
    # Of degree `points - 1` and 0 at both ends, on grids with different numbers of points.
    f = lambda s: s * (1 - s) * (s + 0.3) ** (points - 3) if points > 2 else 0 * s  # noqa: E731
    coarse = f(grid(7))[:, None] * f(grid(9))[None]
    fine = f(grid(15))[:, None] * f(grid(19))[None]
    np.testing.assert_allclose(refine(jnp.asarray(coarse), points), fine, atol=1e-14)


def test_values_of_the_coarse_grid_stay_and_errors_fall_with_the_order():
    errors = []
    for n in (15, 31):
        u = jnp.sin(np.pi * grid(n)) * jnp.exp(grid(n))
        fine = refine(u)
        np.testing.assert_array_equal(fine[1::2], u)
        s = grid(2 * n + 1)
        errors.append(float(jnp.max(jnp.abs(fine - np.sin(np.pi * s) * np.exp(s)))))
    assert errors[1] < errors[0] / 2**5


def test_few_points_are_enough_and_bad_arguments_are_named():
    np.testing.assert_allclose(refine(jnp.array([1.0])), [0.75, 1.0, 0.75])
    with pytest.raises(ValueError, match="points is 1"):
        refine(jnp.ones(3), points=1)
