"""MINRES: symmetric systems, definite or not, with a positive definite preconditioner."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.inner.krylov import LinearResult
from tolerax.inner.metric import definite_norm

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


class MINRES(eqx.Module):
    """Preconditioned minimal residuals for symmetric A, definite or not.

    The norm that falls in every step is `|r|_{P^-1}`, with P the preconditioner. With `lower_bound`
    c, such that no eigenvalue of `P^-1 A` lies in (-c, c), the error `|x - x*|_P` is at most
    `|r|_{P^-1} / c`; the default c = 1 makes the tolerance one on the residual itself.

    - `max_steps`: the most iterations, of one product each.

    Source: Paige and Saunders (*SIAM J. Numer. Anal.* 12, 1975); preconditioned as in Elman,
    Silvester, Wathen, *Finite Elements and Fast Iterative Solvers*, algorithm 4.1.

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, -2.0, 3.0]))
    >>> solve = MINRES()(lambda v: A @ v, jnp.ones(3), tolerance=1e-10)
    >>> solve.x, bool(solve.converged), int(solve.iterations)
    (Array([ 1.        , -0.5       ,  0.33333333], dtype=float64), True, 3)
    """

    max_steps: int = 1000

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
        image: Vector | None = None,
        exact_residual: bool = True,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `preconditioner`: callable `r -> P^-1 r`, linear, symmetric and positive definite. Where
          it is seen not to be, the solve ends with an infinite error.
        - `image`: `P^-1 b` where it is known, for a solve without a guess.
        - `exact_residual`: `False` saves a product and a use of the preconditioner: what is
          returned is the norm of the recurrence.
        """
        dtype, count = b.dtype, jnp.result_type(int)
        inverse = (lambda v: v) if preconditioner is None else preconditioner
        c = jnp.min(jnp.asarray(lower_bound, dtype))
        tiny = jnp.finfo(dtype).tiny
        r0 = b if guess is None else b - operator(guess)
        z0 = inverse(r0) if image is None or guess is not None else image
        first = definite_norm(r0, z0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            *_, gamma, eta, step, broken = state
            return (jnp.abs(eta) > wanted) & (step < self.max_steps) & ~broken & (gamma > 0)

        def body(state: tuple) -> tuple:
            x, (v_old, v), z, (w_old, w), (c_old, cos), (s_old, sin), last, gamma, eta, step, _ = (
                state
            )
            z = z / gamma
            az = operator(z)
            delta = jnp.dot(z, az)
            v_new = az - (delta / gamma) * v - (gamma / last) * v_old
            z_new = inverse(v_new)
            gamma_new = definite_norm(v_new, z_new)
            broken = ~jnp.isfinite(gamma_new)
            gamma_new = jnp.where(broken, 0, gamma_new)
            alpha = cos * delta - c_old * sin * gamma
            rho = jnp.maximum(jnp.hypot(alpha, gamma_new), tiny)
            above = sin * delta + c_old * cos * gamma
            w_new = (z - s_old * gamma * w_old - above * w) / rho
            c_new, s_new = alpha / rho, gamma_new / rho
            x = x + c_new * eta * w_new
            return (
                x,
                (v, v_new),
                z_new,
                (w, w_new),
                (cos, c_new),
                (sin, s_new),
                gamma,
                gamma_new,
                -s_new * eta,
                step + 1,
                broken,
            )

        zeros, one, zero = jnp.zeros_like(b), jnp.ones((), dtype), jnp.zeros((), dtype)
        start = (
            zeros,
            (zeros, r0),
            z0,
            (zeros, zeros),
            (one, one),
            (zero, zero),
            one,
            first,
            first,
            jnp.array(0, count),
            ~jnp.isfinite(first),
        )
        end = jax.lax.while_loop(unfinished, body, start)
        x, steps = end[0], end[-2]
        x = x if guess is None else guess + x
        *_, eta, _, broken = end
        if not exact_residual:
            made = steps + (guess is not None)
            norm = jnp.where(broken, jnp.inf, jnp.abs(eta))
            return LinearResult.by_residual(x, r0, norm, first, wanted, c, steps, made)
        # Rounding makes the recurrence drift off: what counts is the residual itself.
        residual = b - operator(x)
        norm = jnp.where(broken, jnp.inf, definite_norm(residual, inverse(residual)))
        more = steps + 1 + (guess is not None)
        return LinearResult.by_residual(x, residual, norm, first, wanted, c, steps, more)
