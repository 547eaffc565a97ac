"""Cholesky's method for many matrices of some hundred rows."""

import jax.numpy as jnp
from jax.lax import Precision
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

Square = Float[Array, "k n n"]

# Larger matrices are divided into blocks of so many columns.
BLOCK = 16


def cholesky(A: Square) -> Square:
    """The lower factors L of A = L L', NaN from where on there is none.

    Columns go in blocks; what is not a factorization of a block is a product of matrices. Libraries
    of linear algebra start threads for one matrix of a hundred rows: on processors that others use
    too, these wait for each other a hundred times as long as the work takes.

    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(cholesky(4 * jnp.eye(70)[None]), 2 * jnp.eye(70)[None]))
    True
    """
    n = A.shape[-1]
    if n <= BLOCK:
        return jnp.linalg.cholesky(A, symmetrize_input=False)
    L = jnp.zeros_like(A)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        done = L[:, first:, :first]
        # Accelerators would otherwise multiply in less than the precision of the arrays.
        rest = A[:, first:, first:last] - jnp.einsum(
            "kmi,kni->kmn", done, done[:, : last - first], precision=Precision.HIGHEST
        )
        top = jnp.linalg.cholesky(rest[:, : last - first], symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(last - first, dtype=A.dtype)[None], top.shape)
        inverse = solve_triangular(top, eye, lower=True)
        below = jnp.einsum(
            "kmi,kni->kmn", rest[:, last - first :], inverse, precision=Precision.HIGHEST
        )
        L = L.at[:, first:, first:last].set(jnp.concatenate([top, below], axis=1))
    return L
