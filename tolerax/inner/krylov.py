"""Conjugate gradients that know how far they are from the solution.

Every method here takes an absolute tolerance on the error, starts from a guess, and returns the
achieved residual together with an upper bound on the error.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


class LinearResult(eqx.Module):
    """The answer of a linear solve of `A x = b`.

    - `residual`: `b - A x`, recomputed from `x` when `exact_residual` was asked for.
    - `error`: upper bound on the error `|x - x*|_A` in the energy norm (for symmetric positive
      definite A), or on the Euclidean error (otherwise).
    - `first_error`: the same bound for the guess that the solve started from.
    - `curvature`: smallest Rayleigh quotient `p'Ap / p'Dp` met, with D the lower bound on A.
    - `iterations`, `products`: iterations, and products with A (one more for a guess, one more for
      a recomputed residual).
    - `converged`: whether `error <= tolerance`.
    """

    x: Vector
    residual: Vector
    error: Float[Array, ""]
    first_error: Float[Array, ""]
    curvature: Float[Array, ""]
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    converged: Bool[Array, ""]


class CG(eqx.Module):
    """Preconditioned conjugate gradients with Gauss-Radau error bounds.

    With a diagonal `lower_bound` D <= A the energy norm of the error is bounded at every iteration
    by the smaller of `|r|_{D^-1}` and the Gauss-Radau quadrature of Meurant and Tichy (*Numerical
    Algorithms* 62, 2013), which costs no further products. The bounds are rigorous (up to rounding)
    when D is.

    - `max_steps`: the most iterations.
    - `quadrature`: `False` stops on `|r|_{D^-1}` alone.

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> result = CG()(lambda v: A @ v, jnp.ones(3), lower_bound=jnp.ones(3), tolerance=1e-10)
    >>> bool(result.converged), int(result.iterations)
    (True, 3)
    """

    max_steps: int = 1000
    quadrature: bool = eqx.field(static=True, default=True)

    def __call__(
        self,
        operator: Operator,
        b: Vector,
        *,
        lower_bound: Vector,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        guess: Vector | None = None,
        preconditioner: Vector | None = None,
        exact_residual: bool = False,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `lower_bound`: diagonal D with D <= A.
        - `preconditioner`: diagonal P that resembles A (default D).
        """
        dtype = b.dtype
        d = lower_bound
        p_diag = d if preconditioner is None else preconditioner
        # The spectrum of P^-1 A lies above this.
        floor = (1 - 1e-7) * jnp.min(d / p_diag)
        tiny = jnp.finfo(dtype).tiny
        eps = jnp.finfo(dtype).eps
        count = jnp.result_type(int)

        def bound(gamma: Array, rz: Array, r: Vector) -> Array:
            """Squared upper bound on the error from the Radau weight and from |r|_{D^-1}."""
            simple = jnp.sum(r * r / d)
            radau = jnp.where(gamma > 0, gamma * rz, jnp.inf)
            return jnp.minimum(simple, radau) if self.quadrature else simple

        x = jnp.zeros_like(b) if guess is None else guess
        r = b if guess is None else b - operator(guess)
        products = jnp.array(0 if guess is None else 1, count)
        z = r / p_diag
        rz = jnp.dot(r, z)
        gamma = 1 / floor
        first = bound(gamma, rz, r)
        # Rounding keeps residuals from falling below this.
        rounding = (eps**2) * jnp.sum(b * b / d)

        def unfinished(carry: tuple) -> Bool[Array, ""]:
            _, r, _, rz, gamma, gone, _, step, bad = carry
            error = bound(gamma, rz, r)
            # What the error of the guess was: decrements so far plus what is left.
            wanted = jnp.maximum(jnp.square(tolerance), jnp.square(relative) * (gone + error))
            going = (error > wanted) & (rz > tiny) & (jnp.sum(r * r / d) > rounding)
            return going & (step < self.max_steps) & ~bad

        def body(carry: tuple) -> tuple:
            x, r, p, rz, gamma, gone, curvature, step, _ = carry
            ap = operator(p)
            pap = jnp.dot(p, ap)
            curvature = jnp.minimum(curvature, pap / jnp.maximum(jnp.dot(p, d * p), tiny))
            bad = ~(pap > 0)
            alpha = jnp.where(bad, 0, rz / jnp.where(bad, 1, pap))
            x, r = x + alpha * p, r - alpha * ap
            z = r / p_diag
            rz_new = jnp.dot(r, z)
            beta = rz_new / rz
            rest = gamma - alpha
            gamma = jnp.where(rest > 0, rest / (floor * rest + beta), jnp.nan)
            return x, r, z + beta * p, rz_new, gamma, gone + alpha * rz, curvature, step + 1, bad

        zero, inf = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype)
        start = (x, r, z, rz, gamma, zero, inf, jnp.array(0, count), jnp.array(False))
        end = jax.lax.while_loop(unfinished, body, start)
        x, r, _, rz, gamma, gone, curvature, steps, bad = end
        squared = bound(gamma, rz, r)
        error = jnp.sqrt(squared)
        products = products + steps
        if exact_residual:
            true = b - operator(x)
            error = error + jnp.sqrt(jnp.sum((true - r) ** 2 / d))
            r, products = true, products + 1
        error = jnp.where(bad, jnp.inf, error)
        first_error = jnp.sqrt(jnp.minimum(first, gone + squared))
        wanted = jnp.maximum(tolerance, relative * first_error)
        return LinearResult(
            x, r, error, first_error, curvature, steps, products, error <= 1.01 * wanted
        )
