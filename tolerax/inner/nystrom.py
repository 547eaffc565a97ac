"""A preconditioner from products with random vectors."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tolerax.validation import check_integer


class Nystrom(eqx.Module):
    """The inverse of `R + A'` for an approximation A' of low rank of a symmetric positive
    semidefinite A: a preconditioner of R + A where solves with R are cheap and `R^-1 A` has few
    large eigenvalues, as data terms beside a regularization have, or an integral operator beside a
    differential one.

    A' is the Nyström approximation of A on random vectors, which are smooth where R^-1 is
    smoothing. It lies below A, so that the eigenvalues of the preconditioned matrix are between 1
    and 1 + e, with e the largest one of `R^-1 (A - A')`. For R = mu I and a rank of three times the
    effective dimension `trace(A (A + mu I)^-1)` the condition number is below 28 on average
    (Frangella, Tropp, Udell, theorem 1.1).

    - `of(product, inverse, like, key=..., rank=...)`: `product(v)` is A v and `inverse(r)` is
      `R^-1 r`, on pytrees like `like`; `rank` products with A are taken at once, by `vmap`.
    - `mv(r)`: the preconditioner times r, a use of `inverse` and `2 rank` products of vectors.
    - `weights`: the eigenvalues of `R^-1 A'`, falling, shape `(rank,)`, 0 beyond the rank of A. A
      last one well above 1 says that a larger rank would help. Where A is not semidefinite the
      directions of A' that are not are left out.

    Sources: Frangella, Tropp, Udell (*SIAM J. Matrix Anal. Appl.* 44, 2023), for R = mu I; Villa,
    Petra, Ghattas (*ACM Trans. Math. Softw.* 47, 2021) for operators R, with a second pass.

    >>> import jax, jax.numpy as jnp
    >>> from tolerax.inner import CG, Nystrom
    >>> X = jax.random.normal(jax.random.key(0), (200, 50)) * 0.5 ** jnp.arange(50)[None]
    >>> gram = lambda v: X.T @ (X @ v)
    >>> ridge = 1e-4
    >>> P = Nystrom.of(gram, lambda r: r / ridge, jnp.ones(50), key=jax.random.key(1), rank=20)
    >>> solve = lambda preconditioner: CG()(
    ...     lambda v: gram(v) + ridge * v,
    ...     jnp.ones(50),
    ...     lower_bound=jnp.full(50, ridge),
    ...     tolerance=1e-8,
    ...     preconditioner=preconditioner,
    ... )
    >>> int(solve(P.mv).iterations) < 10 < int(solve(None).iterations)
    True
    """

    vectors: Float[Array, "n rank"]  # V of A' = R V diag(weights) V' R, with V' R V = I
    weights: Float[Array, " rank"]
    inverse: Callable[[PyTree], PyTree]

    @classmethod
    def of(
        cls,
        product: Callable[[PyTree], PyTree],
        inverse: Callable[[PyTree], PyTree],
        like: PyTree,
        *,
        key: PRNGKeyArray,
        rank: int,
    ) -> "Nystrom":
        x, unravel = ravel_pytree(like)
        check_integer("rank", rank)
        if rank > x.size:
            raise ValueError(f"rank is {rank}: there are {x.size} unknowns; give no more.")
        small = rank * float(jnp.finfo(x.dtype).eps)

        def on_columns(operator: Callable, columns: Array) -> Array:
            flat = lambda v: ravel_pytree(operator(unravel(v)))[0].astype(x.dtype)  # noqa: E731
            return jax.vmap(flat, in_axes=1, out_axes=1)(columns)

        tests = on_columns(inverse, jax.random.normal(key, (x.size, rank), x.dtype))
        tests, _ = jnp.linalg.qr(tests)
        image = on_columns(product, tests)
        inner = tests.T @ image
        root = image @ _inverse_root(0.5 * (inner + inner.T), small)  # A' = root root'
        turned = on_columns(inverse, root)
        gram = root.T @ turned
        weights, W = jnp.linalg.eigh(0.5 * (gram + gram.T))
        weights, W = weights[::-1], W[:, ::-1]
        used = weights > small * weights[0]
        scale = jnp.where(used, 1 / jnp.sqrt(jnp.where(used, weights, 1)), 0)
        return cls(turned @ (W * scale[None]), jnp.where(used, weights, 0), inverse)

    def mv(self, r: PyTree) -> PyTree:
        """The preconditioner times r."""
        b, unravel = ravel_pytree(r)
        z, _ = ravel_pytree(self.inverse(r))
        along = self.weights / (1 + self.weights) * (self.vectors.T @ b)
        return unravel((z - self.vectors @ along).astype(b.dtype))


def _inverse_root(inner: Float[Array, "k k"], small: float) -> Float[Array, "k k"]:
    """C with `C C' = inner^-1` on the eigenvectors whose eigenvalues are positive and no rounding,
    0 on others."""
    values, vectors = jnp.linalg.eigh(inner)
    kept = values > small * values[-1]
    return vectors * jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)[None]
