"""Stabilized bi-conjugate gradients: Lineax's, with a tolerance on the error and a guess."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from tolerax.inner.krylov import LinearResult

Vector = Float[Array, " n"]


class BiCGStab(eqx.Module):
    """Stabilized bi-conjugate gradients (`lineax.BiCGStab`) for general A: short recurrences, two
    products an iteration.

    With `lower_bound` c <= sigma_min(A) the Euclidean error is at most `|r| / c`; the default c = 1
    makes the tolerance one on the residual.

    - `max_steps`: the most iterations.

    >>> import jax.numpy as jnp
    >>> A = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    >>> bool(BiCGStab()(lambda v: A @ v, jnp.ones(2), tolerance=1e-10).converged)
    True
    """

    max_steps: int = eqx.field(static=True, default=1000)

    def __call__(
        self,
        operator: Callable[[Vector], Vector],
        b: Vector,
        *,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        lower_bound: ArrayLike = 1.0,
        guess: Vector | None = None,
        preconditioner: Callable[[Vector], Vector] | None = None,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `preconditioner`: linear callable that resembles `A^-1`.
        """
        import lineax as lx

        c = jnp.min(jnp.asarray(lower_bound, b.dtype))
        x0 = jnp.zeros_like(b) if guess is None else guess
        before = b - operator(x0)
        first = jnp.linalg.norm(before)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, b.dtype), relative * first / c)
        structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
        wrapped = lx.FunctionLinearOperator(operator, structure)
        options: dict[str, Any] = {}
        if preconditioner is not None:
            options["preconditioner"] = lx.FunctionLinearOperator(preconditioner, structure)
        # Lineax measures residuals entry by entry against atol.
        entry: Any = 0.5 * wanted / jnp.sqrt(b.size)

        def one_step() -> Vector:
            # The step along the residual that leaves the least of it: all of the way where b is an
            # eigenvector, for which the recurrence ends in 0/0.
            image = operator(before)
            return jnp.dot(image, before) / jnp.dot(image, image) * before

        def correct() -> tuple[Vector, Array, Array]:
            method = lx.BiCGStab(rtol=0.0, atol=entry, max_steps=self.max_steps)
            solution = lx.linear_solve(wrapped, before, method, options=options, throw=False)
            steps = jnp.asarray(solution.stats["num_steps"], jnp.result_type(int))
            broke = ~jnp.all(jnp.isfinite(solution.value))
            step = jax.lax.cond(broke, one_step, lambda: solution.value)
            return x0 + jnp.where(jnp.isfinite(step), step, 0), steps, broke.astype(steps.dtype)

        none = jnp.array(0, jnp.result_type(int))
        enough = (first <= wanted) | ~jnp.isfinite(first)
        x, steps, broke = jax.lax.cond(enough, lambda: (x0, none, none), correct)
        residual = b - operator(x)
        norm = jnp.linalg.norm(residual)
        better = norm <= first
        x, residual = jnp.where(better, x, x0), jnp.where(better, residual, before)
        norm = jnp.where(better, norm, first)
        more = 2 * steps + 2 + broke
        return LinearResult.by_residual(x, residual, norm, first, wanted, c, steps, more)
