"""Sets that particles stay on: by projection (`retract`), or as the image of a mirror map."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from tolerax.validation import check_options


class Sphere(eqx.Module):
    """The nearest point with norm `radius`, for `retract` (all leaves of x together)."""

    radius: float = 1.0

    def __check_init__(self):
        check_options(self, positive="radius")

    def __call__(self, x: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(x)
        norm = jnp.linalg.norm(flat)
        first = jnp.zeros_like(flat).at[0].set(1)
        return unravel(
            self.radius * jnp.where(norm > 0, flat / jnp.where(norm > 0, norm, 1), first)
        )


class Stiefel(eqx.Module):
    """The nearest matrix with orthonormal columns (polar factor), for `retract`; x is one matrix of
    shape (n, p) with n >= p."""

    def __call__(self, x: Float[Array, "n p"]) -> Float[Array, "n p"]:
        u, _, vt = jnp.linalg.svd(x, full_matrices=False)
        return u @ vt


class MirrorMap(eqx.Module):
    """The gradient of a convex conjugate, from a space without bounds onto a set.

    Particles take their steps in the dual space, where there is room in every direction, and are
    evaluated at their images. Unlike a projection it has an inverse, so that it does not put
    different particles on one point (up to rounding).
    """

    @abc.abstractmethod
    def __call__(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """The point of the set."""

    @abc.abstractmethod
    def inverse(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """A dual point whose image is x."""


class Simplex(MirrorMap):
    """Positive numbers whose sum is `total` (all leaves of x together), by the map of the entropy,
    `x = total * softmax(y)`.

    >>> import jax.numpy as jnp
    >>> from tolerax.solvers import Simplex
    >>> shares = Simplex()(jnp.array([0.0, 0.0, jnp.log(2.0)]))
    >>> shares, Simplex()(Simplex().inverse(shares)).sum()
    (Array([0.25, 0.25, 0.5 ], dtype=float64), Array(1., dtype=float64))
    """

    total: float = 1.0

    def __check_init__(self):
        check_options(self, positive="total")

    def __call__(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.total * jax.nn.softmax(y)

    def inverse(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.log(jnp.maximum(x / self.total, jnp.finfo(x.dtype).tiny))


class Ball(MirrorMap):
    """Points with a norm of at most `radius` (all leaves of x together), by the map
    `x = y / sqrt(1 + |y|^2 / radius^2)`."""

    radius: float = 1.0

    def __check_init__(self):
        check_options(self, positive="radius")

    def __call__(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        return y / jnp.sqrt(1 + jnp.sum(y * y) / self.radius**2)

    def inverse(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        inside = 1 - jnp.sum(x * x) / self.radius**2
        return x / jnp.sqrt(jnp.maximum(inside, 4 * jnp.finfo(x.dtype).eps))
