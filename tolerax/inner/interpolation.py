"""Quadratic models through values at few points.

Fewer points than a quadratic has coefficients leave freedom. It goes to the Hessian that is nearest
to a given one, the last one, in the Frobenius norm: what was learned of it at points that have left
the set stays.

Source: Powell (*Mathematical Programming* 100, 2004), "Least Frobenius norm updating of quadratic
models that satisfy interpolation conditions"; Conn, Scheinberg, Vicente (*Introduction to
Derivative-Free Optimization*, SIAM 2009), chapter 5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Points = Float[Array, "m n"]


class Quadratic(NamedTuple):
    """`c + g's + s'Hs/2`; many of them with a leading axis."""

    c: Float[Array, "*k"]
    g: Float[Array, "*k n"]
    H: Float[Array, "*k n n"]

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, "*k"]:
        return self.c + self.g @ s + 0.5 * (self.H @ s) @ s


class Basis(NamedTuple):
    """What models through the same points share: the factors of the system that gives the weights
    of the points in the Hessian, the constant and the gradient, in this order."""

    points: Points
    mask: Bool[Array, " m"]
    factors: tuple[Array, Array]

    def _weights(self, right: Float[Array, " rows"]) -> Float[Array, " rows"]:
        # One right side at a time: many are given to threads, which cost more than they save.
        return jax.scipy.linalg.lu_solve(self.factors, right)

    def model(self, values: Float[Array, " m"], H: Float[Array, "n n"]) -> Quadratic:
        """The quadratic with these values whose Hessian is the nearest to `H`."""
        m, n = self.points.shape
        curved = 0.5 * jnp.sum((self.points @ H) * self.points, axis=1)
        right = jnp.where(self.mask, values - curved, 0)
        weights = self._weights(jnp.concatenate([right, jnp.zeros(n + 1, right.dtype)]))
        correction = (self.points * weights[:m, None]).T @ self.points
        return Quadratic(weights[m], weights[m + 1 :], H + correction)

    def lagrange(self, which: Int[Array, ""] | int) -> Quadratic:
        """The least-curved quadratic that is 1 at one of the points and 0 at the others."""
        m, n = self.points.shape
        one = jnp.zeros(m, self.points.dtype).at[which].set(1)
        return self.model(one, jnp.zeros((n, n), one.dtype))

    def lagrange_at(self, s: Float[Array, " n"]) -> Float[Array, " m"]:
        """The values of all those at s."""
        squares = jnp.where(self.mask, 0.5 * (self.points @ s) ** 2, 0)
        right = jnp.concatenate([squares, jnp.ones(1, s.dtype), s])
        return jnp.where(self.mask, self._weights(right)[: squares.size], 0)


def basis(points: Points, mask: Bool[Array, " m"], fixed: Bool[Array, " n"] | None = None) -> Basis:
    """Models through the points where `mask` is set, of which there must be at least n + 1, best
    within a few units of the origin. Coordinates that are `fixed` have no slope.

    With n + 1 points models are linear, with (n + 1)(n + 2) / 2 they are determined by the values.

    >>> import jax, jax.numpy as jnp
    >>> points = jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2), -jnp.eye(2)])
    >>> values = points[:, 0] ** 2 + points[:, 1]
    >>> q = basis(points, jnp.ones(5, bool)).model(values, jnp.eye(2))
    >>> q.g, q.H
    (Array([0., 1.], dtype=float64), Array([[2., 0.], [0., 0.]], dtype=float64))
    """
    n, dtype = points.shape[1], points.dtype
    points = jnp.where(mask[:, None], points, 0)
    products = 0.5 * (points @ points.T) ** 2
    products = products + jnp.diag(jnp.where(mask, 0, 1).astype(dtype))
    X = jnp.concatenate([mask[:, None].astype(dtype), points], axis=1)
    corner = jnp.zeros((n + 1, n + 1), dtype)
    if fixed is not None:
        still = jnp.concatenate([jnp.zeros(1, bool), fixed])
        X = jnp.where(still[None], 0, X)
        corner = corner + jnp.diag(still.astype(dtype))
    system = jnp.block([[products, X], [X.T, corner]])
    return Basis(points, mask, jax.scipy.linalg.lu_factor(system))
