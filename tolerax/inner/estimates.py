"""Estimates of constants that nobody gave or proved. They are measured, not bounded, and every
result that rests on one says so."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

Vector = Float[Array, " n"]


def smallest_eigenvalue(
    operator: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[Float[Array, ""], Vector]:
    """Smallest Ritz value of a symmetric operator after `steps` Lanczos steps, and its vector.

    It lies above the smallest eigenvalue; starting from the vector of an earlier call makes it
    tight. Full reorthogonalization; `steps` products.

    >>> import jax.numpy as jnp
    >>> value, _ = smallest_eigenvalue(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.ones(3), 3)
    >>> round(float(value), 6)
    1.0
    """
    n = start.size
    steps = min(steps, n)
    tiny = jnp.finfo(start.dtype).tiny
    first = start / jnp.maximum(jnp.linalg.norm(start), tiny)

    def step(carry: tuple, k: Array) -> tuple:
        basis, v = carry
        basis = basis.at[k].set(v)
        w = operator(v)
        alpha = jnp.dot(v, w)
        w = w - basis.T @ (basis @ w)
        w = w - basis.T @ (basis @ w)
        beta = jnp.linalg.norm(w)
        return (basis, w / jnp.maximum(beta, tiny)), (alpha, beta)

    basis = jnp.zeros((steps, n), start.dtype)
    (basis, _), (alpha, beta) = jax.lax.scan(step, (basis, first), jnp.arange(steps))
    # After an invariant subspace the rest of the matrix is meaningless: cut it off.
    scale = jnp.max(jnp.abs(alpha))
    alive = jnp.cumprod(jnp.concatenate([jnp.ones(1), beta[:-1] > 1e-12 * scale])) > 0
    alpha = jnp.where(alive, alpha, 2 * scale)
    off = jnp.where(alive[1:], beta[:-1], 0)
    matrix = jnp.diag(alpha) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return values[0], basis.T @ jnp.where(alive, vectors[:, 0], 0)


def largest_singular_value(
    forward: Callable[[Vector], Array],
    backward: Callable[[Array], Vector],
    start: Vector,
    steps: int = 2,
) -> tuple[Float[Array, ""], Vector]:
    """Largest singular value by power iteration, from below, and its right vector.

    `2 * steps` applications; starting from the vector of an earlier call makes it tight.
    """
    tiny = jnp.finfo(start.dtype).tiny

    def body(_: ArrayLike, carry: tuple) -> tuple:
        v, _ = carry
        v = v / jnp.maximum(jnp.linalg.norm(v), tiny)
        u = forward(v)
        return backward(u), jnp.linalg.norm(u)

    v, value = jax.lax.fori_loop(0, steps, body, (start, jnp.zeros((), start.dtype)))
    return value, v
