"""Krylov methods for general square systems: Lineax's, with a tolerance on the error, a guess, and
the achieved residual returned."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from tolerax.inner.krylov import LinearResult

Vector = Float[Array, " n"]


class GMRES(eqx.Module):
    """Restarted GMRES (`lineax.GMRES`).

    With `lower_bound` c <= sigma_min(A) (a vector whose smallest entry counts) the Euclidean error
    is at most `|r| / c`; the solve goes on until that is below the tolerance. `products` counts
    `restart` products a cycle, the most it can have taken.

    - `restart`, `max_cycles`: Krylov dimension and the most cycles.
    - `preconditioner`: callable that approximates `A^-1`, or `None`.

    >>> import jax.numpy as jnp
    >>> A = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    >>> solve = GMRES()(lambda v: A @ v, jnp.ones(2), lower_bound=jnp.ones(2), tolerance=1e-10)
    >>> bool(solve.converged)
    True
    """

    restart: int = eqx.field(static=True, default=20)
    max_cycles: int = eqx.field(static=True, default=100)
    preconditioner: Callable | None = None

    def _method(self, tolerance: Any) -> Any:
        import lineax as lx

        return lx.GMRES(rtol=0.0, atol=tolerance, restart=self.restart, max_steps=self.max_cycles)

    def __call__(
        self,
        operator: Callable[[Vector], Vector],
        b: Vector,
        *,
        lower_bound: Vector,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        guess: Vector | None = None,
        preconditioner: Vector | None = None,
        exact_residual: bool = True,
    ) -> LinearResult:
        """Solve until `|b - A x| / c` is at most `tolerance` or `relative` times that of the guess.

        The diagonal `preconditioner` and `exact_residual` of [`CG`][] have no use here: the
        preconditioner is a field, the residual is always recomputed.
        """
        import lineax as lx

        del preconditioner, exact_residual
        c = jnp.min(lower_bound)
        x0 = jnp.zeros_like(b) if guess is None else guess
        first = b - operator(x0)
        first_error = jnp.linalg.norm(first) / c
        wanted = jnp.maximum(jnp.asarray(tolerance), relative * first_error)
        structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
        wrapped = lx.FunctionLinearOperator(operator, structure)
        options: dict[str, Any] = {}
        if self.preconditioner is not None:
            options["preconditioner"] = lx.FunctionLinearOperator(self.preconditioner, structure)
        # Lineax measures residuals entry by entry against atol.
        entry = 0.5 * c * wanted / jnp.sqrt(b.size)

        def correct() -> tuple[Vector, Array]:
            solution = lx.linear_solve(
                wrapped, first, self._method(entry), options=options, throw=False
            )
            steps = jnp.asarray(solution.stats["num_steps"], jnp.result_type(int))
            return x0 + jnp.where(jnp.isfinite(solution.value), solution.value, 0), steps

        none = jnp.array(0, jnp.result_type(int))
        enough = (first_error <= wanted) | ~jnp.isfinite(first_error)
        x, cycles = jax.lax.cond(enough, lambda: (x0, none), correct)
        residual = b - operator(x)
        better = jnp.linalg.norm(residual) <= jnp.linalg.norm(first)
        x, residual = jnp.where(better, x, x0), jnp.where(better, residual, first)
        error = jnp.linalg.norm(residual) / c
        iterations = cycles * self._products_per_step
        return LinearResult(
            x=x,
            residual=residual,
            error=error,
            first_error=first_error,
            curvature=jnp.full((), jnp.inf, b.dtype),
            largest=jnp.zeros((), b.dtype),
            rounding=jnp.zeros((), b.dtype),
            iterations=iterations,
            products=iterations + 2,
            converged=error <= wanted,
        )

    @property
    def _products_per_step(self) -> int:
        return self.restart


class BiCGStab(GMRES):
    """Stabilized bi-conjugate gradients (`lineax.BiCGStab`): short recurrences, two products an
    iteration. Same contract as [`GMRES`][]."""

    max_steps: int = eqx.field(static=True, default=1000)

    def _method(self, tolerance: Any) -> Any:
        import lineax as lx

        return lx.BiCGStab(rtol=0.0, atol=tolerance, max_steps=self.max_steps)

    @property
    def _products_per_step(self) -> int:
        return 2
