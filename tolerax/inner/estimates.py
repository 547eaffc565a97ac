"""Estimates of constants that nobody gave or proved. They are measured, not bounded, and every
result that rests on one says so."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

Vector = Float[Array, " n"]


def smallest_eigenvalue(
    operator: Callable[[Vector], Vector],
    start: Vector,
    steps: int,
    inverse: Callable[[Vector], Vector] | None = None,
) -> tuple[Float[Array, ""], Vector]:
    """Smallest Ritz value of a symmetric operator after `steps` Lanczos steps, and its vector.

    It lies above the smallest eigenvalue; starting from the vector of an earlier call makes it
    tight. Full reorthogonalization; `steps` products. With `inverse` R^-1 it is that of
    `A v = lambda R v`, and start and vector are residuals, R v.

    >>> import jax.numpy as jnp
    >>> value, _ = smallest_eigenvalue(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.ones(3), 3)
    >>> round(float(value), 6)
    1.0
    """
    steps = min(steps, start.size)
    tiny = jnp.finfo(start.dtype).tiny

    def unit(g: Vector) -> tuple[Array, Vector, Vector]:
        """The norm of R^-1 g, it and g over the norm."""
        v = g if inverse is None else inverse(g)
        norm = jnp.sqrt(jnp.maximum(jnp.dot(v, g), 0))
        return norm, v / jnp.maximum(norm, tiny), g / jnp.maximum(norm, tiny)

    def step(carry: tuple, k: Array) -> tuple:
        vectors, duals, v, g = carry
        vectors = vectors.at[k].set(v)
        duals = None if duals is None else duals.at[k].set(g)
        dual_rows = vectors if duals is None else duals
        w = operator(v)
        alpha = jnp.dot(v, w)
        w = w - dual_rows.T @ (vectors @ w)
        w = w - dual_rows.T @ (vectors @ w)
        beta, v, g = unit(w)
        return (vectors, duals, v, g), (alpha, beta)

    rows = jnp.zeros((steps, start.size), start.dtype)
    _, v, g = unit(start)
    begin = (rows, None if inverse is None else rows, v, g)
    (vectors, duals, *_), (alpha, beta) = jax.lax.scan(step, begin, jnp.arange(steps))
    # After an invariant subspace the rest of the matrix is meaningless: cut it off.
    scale = jnp.max(jnp.abs(alpha))
    alive = jnp.cumprod(jnp.concatenate([jnp.ones(1), beta[:-1] > 1e-12 * scale])) > 0
    alpha = jnp.where(alive, alpha, 2 * scale)
    off = jnp.where(alive[1:], beta[:-1], 0)
    matrix = jnp.diag(alpha) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, coefficients = jnp.linalg.eigh(matrix)
    basis = vectors if duals is None else duals
    return values[0], basis.T @ jnp.where(alive, coefficients[:, 0], 0)


def largest_singular_value(
    forward: Callable[[Vector], Array],
    backward: Callable[[Array], Vector],
    start: Vector,
    steps: int = 2,
    dual: Callable[[Array], Array] = lambda u: u,
    norm: Callable[[Vector], Array] = jnp.linalg.norm,
) -> tuple[Float[Array, ""], Vector]:
    """Largest singular value by power iteration, from below, and its right vector.

    `2 * steps` applications; starting from the vector of an earlier call makes it tight. Images u
    are measured in the norm `sqrt(u' dual(u))`, vectors in `norm`, in whose inner product
    `backward` has to be the adjoint.
    """
    tiny = jnp.finfo(start.dtype).tiny

    def body(_: ArrayLike, carry: tuple) -> tuple:
        v, _ = carry
        v = v / jnp.maximum(norm(v), tiny)
        u = forward(v)
        w = dual(u)
        return backward(w), jnp.sqrt(jnp.maximum(jnp.vdot(u, w), 0))

    v, value = jax.lax.fori_loop(0, steps, body, (start, jnp.zeros((), start.dtype)))
    return value, v
