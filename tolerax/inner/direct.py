"""Linear systems that a fast solve inverts up to rounding."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.inner.krylov import LinearResult

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


class Direct(eqx.Module):
    """`x = P^-1 b` where the preconditioner is the inverse of A up to rounding: a fast transform, a
    factorization. What rounding leaves is corrected as often as the tolerance asks.

    Takes the place of [`MINRES`][] or [`GMRES`][] in the problems of this library. A step of these
    needs one application of P^-1 and so does the norm of a residual; here a solve takes one in all.

    - `floor`: a lower bound on the eigenvalues of P: residuals are at most `|r| / sqrt(floor)` in
      the norm in which errors are bounded, which takes no further application of P^-1.
    - `max_steps`: the most applications; without progress the solve ends before, as not converged.

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> inverse = lambda r: r / jnp.diag(A)
    >>> solve = Direct()(lambda v: A @ v, jnp.ones(3), tolerance=1e-10, preconditioner=inverse)
    >>> bool(solve.converged), int(solve.products)
    (True, 1)
    """

    floor: float | Float[Array, ""] = 1.0
    max_steps: int = 4

    def __call__(
        self,
        operator: Operator,
        b: Vector,
        *,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        lower_bound: ArrayLike = 1.0,
        guess: Vector | None = None,
        preconditioner: Operator | None = None,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `preconditioner`: callable `r -> P^-1 r`, linear.
        """
        if preconditioner is None:
            raise ValueError("preconditioner is None: Direct needs a fast solve (`riesz`).")
        dtype, count = b.dtype, jnp.result_type(int)
        c = jnp.min(jnp.asarray(lower_bound, dtype))
        root = jnp.sqrt(jnp.asarray(self.floor, dtype))
        size = lambda r: jnp.linalg.norm(r) / root  # noqa: E731
        x0 = jnp.zeros_like(b) if guess is None else guess
        r0 = b if guess is None else b - operator(guess)
        first = size(r0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, r, before, step = state
            # Rounding keeps residuals from falling for ever.
            return (size(r) > wanted) & (size(r) < 0.1 * before) & (step < self.max_steps)

        def body(state: tuple) -> tuple:
            x, r, _, step = state
            x = x + preconditioner(r)
            return x, b - operator(x), size(r), step + 1

        start = (x0, r0, jnp.array(jnp.inf, dtype), jnp.array(0, count))
        x, r, before, steps = jax.lax.while_loop(unfinished, body, start)
        norm = size(r)
        # At rounding the residual is as small as it can be, which is as close as solves get.
        result = LinearResult.by_residual(x, r, norm, first, wanted, c, steps, steps)
        floor = 64 * jnp.finfo(dtype).eps * jnp.maximum(first, before * (before < jnp.inf))
        return eqx.tree_at(lambda s: s.converged, result, result.converged | (norm <= floor))
