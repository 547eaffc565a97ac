"""Grid functions on a finer grid, for nested iteration."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def refine(u: Float[Array, "..."], points: int = 6) -> Float[Array, "..."]:
    """A function on the interior points of a grid, interpolated to the grid of half the spacing.

    n points along every axis become 2n + 1. The function is 0 next to the first and the last point.
    Interpolation is by polynomials through the nearest `points` values, also near the boundary:
    a difference equation of second order then holds up to `h^(points - 2)`, so that the start of a
    fine solve is smooth.

    Nested iteration solves on a coarse grid first, refines state, control and multipliers, and
    starts from there: `benchmarks/pde_full_space.py` is an example.

    - `points`: how many values a polynomial is put through, where there are as many.

    >>> import jax.numpy as jnp
    >>> refine(jnp.array([3.0, 4.0, 3.0]))  # x (4 - x)
    Array([1.75, 3.  , 3.75, 4.  , 3.75, 3.  , 1.75], dtype=float64)
    """
    if points < 2:
        raise ValueError(f"points is {points}: give at least 2.")
    for axis in range(u.ndim):
        matrix = jnp.asarray(_matrix(u.shape[axis], points), u.dtype)
        u = jnp.moveaxis(jnp.tensordot(matrix, u, (1, axis)), 0, axis)
    return u


def _matrix(n: int, points: int) -> np.ndarray:
    """The weights, a row for each point of the fine grid."""
    points = min(points, n + 2)
    weights = np.zeros((2 * n + 1, n + 2))
    for row in range(2 * n + 1):
        x = (row + 1) / 2
        first = int(np.clip(np.floor(x) - points // 2 + 1, 0, n + 2 - points))
        nodes = np.arange(first, first + points)
        for node in nodes:
            others = nodes[nodes != node]
            weights[row, node] = np.prod((x - others) / (node - others))
    return weights[:, 1:-1]
