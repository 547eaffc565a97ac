"""Inner products other than the Euclidean one."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def definite_norm(r: Float[Array, " n"], z: Float[Array, " n"]) -> Float[Array, ""]:
    """`sqrt(r'R^-1 r)` from r and `z = R^-1 r`. Infinite where this shows that R is not positive
    definite, since then it measures nothing: a wrong sign is no residual of 0.

    >>> import jax.numpy as jnp
    >>> r = jnp.array([3.0, 4.0])
    >>> float(definite_norm(r, r)), float(definite_norm(r, -r)), float(definite_norm(0 * r, -r))
    (5.0, inf, 0.0)
    """
    kind = jnp.finfo(r.dtype)
    square, size = jnp.dot(r, z), jnp.linalg.norm(r)
    # The angle between r and R^-1 r is right only up to rounding. Squares of less may vanish.
    wrong = ~(square > 100 * kind.eps * size * jnp.linalg.norm(z))
    wrong = wrong & (size > kind.tiny**0.5 / kind.eps)
    return jnp.where(wrong, jnp.inf, jnp.sqrt(jnp.maximum(square, 0)))


class Metric(eqx.Module):
    """The inner product `(u, v) = u'R v` on x, with R symmetric and positive definite.

    What is a function on a grid has derivatives that shrink with the cells and a Hessian that is as
    ill-conditioned as the grid is fine. In the inner product of the function space neither depends
    on the grid: the gradient is `R^-1 g`, its size `sqrt(g'R^-1 g)`.

    - `mv`: v -> R v; `solve`: g -> R^-1 g; on pytrees like x.

    [`Metric.of`][] makes one from the weights of a diagonal R, for instance the area of a cell.

    >>> import jax.numpy as jnp
    >>> Metric.of(0.25).solve(jnp.ones(2))
    Array([4., 4.], dtype=float64)
    """

    mv: Callable[[PyTree], PyTree]
    solve: Callable[[PyTree], PyTree]

    @classmethod
    def of(cls, given: Any) -> "Metric | None":
        """A metric, or from a positive number or a pytree of weights like x; `None` stays."""
        if given is None or isinstance(given, cls):
            return given
        for leaf in jax.tree.leaves(given):
            if callable(leaf) or not bool(jnp.all(jnp.asarray(leaf) > 0)):
                raise ValueError(
                    f"metric is {given!r}: give positive weights (a number, or a pytree like x), "
                    "or a `tolerax.inner.Metric(mv, solve)`."
                )
        weights = jax.tree.map(jnp.asarray, given)
        return cls(Weights(weights, False), Weights(weights, True))


class Weights(eqx.Module):
    """Products with the diagonal matrix of weights, or with its inverse."""

    weights: PyTree
    inverse: bool = eqx.field(static=True)

    def __call__(self, v: PyTree) -> PyTree:
        def scaled(w: Any, leaf: Any) -> Any:
            return leaf / w if self.inverse else w * leaf

        if eqx.is_array(self.weights) and self.weights.ndim == 0:
            return jax.tree.map(lambda leaf: scaled(self.weights.astype(leaf.dtype), leaf), v)
        return jax.tree.map(scaled, self.weights, v)
