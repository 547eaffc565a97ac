"""Cholesky's method for many matrices of some hundred rows."""

import jax.numpy as jnp
from jax.lax import Precision
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

Square = Float[Array, "k n n"]

# Larger matrices are divided into blocks of so many columns.
BLOCK = 16


def inverse_factor(A: Square) -> Square:
    """The inverses of the lower factors L of A = L L', NaN from where on there is none.

    With the inverse every solve is two products. Columns go in blocks; what is not a factorization
    of a block is a product of matrices. Libraries of linear algebra start threads for one matrix of
    a hundred rows: on processors that others use too, these wait for each other a hundred times as
    long as the work takes.

    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(inverse_factor(4 * jnp.eye(70)[None]), 0.5 * jnp.eye(70)[None]))
    True
    """
    n = A.shape[-1]
    L, inverse = jnp.zeros_like(A), jnp.zeros_like(A)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        rest = A[:, first:, first:last]
        if first:
            done = L[:, first:, :first]
            rest = rest - _product("kmi,kni->kmn", done, done[:, : last - first])
        top = jnp.linalg.cholesky(rest[:, : last - first], symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(last - first, dtype=A.dtype)[None], top.shape)
        corner = solve_triangular(top, eye, lower=True)
        if n <= BLOCK:
            return corner
        below = _product("kmi,kni->kmn", rest[:, last - first :], corner)
        L = L.at[:, first:, first:last].set(jnp.concatenate([top, below], axis=1))
        left = _product("kmi,kin->kmn", L[:, first:last, :first], inverse[:, :first, :first])
        left = -_product("kmi,kin->kmn", corner, left)
        inverse = inverse.at[:, first:last, :last].set(jnp.concatenate([left, corner], axis=2))
    return inverse


def _product(form: str, one: Array, other: Array) -> Array:
    """Accelerators would otherwise multiply in less than the precision of the arrays."""
    return jnp.einsum(form, one, other, precision=Precision.HIGHEST)
