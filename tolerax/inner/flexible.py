"""Conjugate gradients whose preconditioner may change from step to step."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.inner.krylov import LinearResult

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


def _identity(v: Vector) -> Vector:
    return v


class FlexibleCG(eqx.Module):
    """Conjugate gradients for symmetric positive definite A with any preconditioner, also one that
    is not linear: every direction is made A-orthogonal to the last ones explicitly.

    With `lower_bound` c <= the smallest eigenvalue of A the Euclidean error is at most `|r| / c`;
    the default c = 1 makes the tolerance one on the residual.

    - `max_steps`: the most iterations, of one product each. `memory`: directions that are kept.

    Source: Notay (*SIAM J. Sci. Comput.* 22, 2000).

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> crooked = lambda r: r / (1 + jnp.abs(r))
    >>> solve = FlexibleCG()(lambda v: A @ v, jnp.ones(3), tolerance=1e-10, preconditioner=crooked)
    >>> bool(solve.converged)
    True
    """

    max_steps: int = 1000
    memory: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}: keep at least one direction.")

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

        - `preconditioner`: callable that resembles `A^-1`.
        """
        dtype, count = b.dtype, jnp.result_type(int)
        precondition = preconditioner or _identity
        c = jnp.min(jnp.asarray(lower_bound, dtype))
        x0 = jnp.zeros_like(b) if guess is None else guess
        r0 = b if guess is None else b - operator(guess)
        first = jnp.linalg.norm(r0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)
        tiny = jnp.finfo(dtype).tiny

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, r, *_, step, broken = state
            return (jnp.linalg.norm(r) > wanted) & (step < self.max_steps) & ~broken

        def body(state: tuple) -> tuple:
            x, r, p, ap, pap, curvature, step, _ = state
            z = precondition(r)
            # A preconditioner that turns away from the residual is replaced by none.
            z = jnp.where(jnp.dot(z, r) > 0, z, r)
            z = z - p.T @ jnp.where(pap > 0, (ap @ z) / jnp.where(pap > 0, pap, 1), 0)
            az = operator(z)
            zaz = jnp.dot(z, az)
            broken = ~(zaz > 0) | ~jnp.isfinite(zaz)
            alpha = jnp.where(broken, 0, jnp.dot(z, r) / jnp.where(broken, 1, zaz))
            row = step % self.memory
            curvature = jnp.minimum(curvature, zaz / jnp.maximum(jnp.dot(z, z), tiny))
            return (
                x + alpha * z,
                r - alpha * az,
                p.at[row].set(z),
                ap.at[row].set(az),
                pap.at[row].set(zaz),
                curvature,
                step + 1,
                broken,
            )

        rows = jnp.zeros((self.memory, b.size), dtype)
        none, inf = jnp.zeros(self.memory, dtype), jnp.array(jnp.inf, dtype)
        begin = (x0, r0, rows, rows, none, inf, jnp.array(0, count), ~jnp.isfinite(first))
        x, _, _, _, _, curvature, steps, _ = jax.lax.while_loop(unfinished, body, begin)
        residual = b - operator(x)
        more = steps + 1 + (guess is not None)
        norm = jnp.linalg.norm(residual)
        result = LinearResult.by_residual(x, residual, norm, first, wanted, c, steps, more)
        return eqx.tree_at(lambda r: r.curvature, result, curvature / c)
