"""Conjugate gradients that know how far they are from the solution.

Every method here takes an absolute tolerance on the error, starts from a guess, and returns the
achieved residual together with an upper bound on the error.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from tolerax.inner.bounds import dual_norm, dual_norm_given
from tolerax.inner.metric import definite_norm
from tolerax.inner.recycled import Recycled

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


class LinearResult(eqx.Module):
    """The answer of a linear solve of `A x = b`.

    - `residual`: `b - A x`, recomputed from `x`.
    - `error`: upper bound on the error `|x - x*|_A` in the energy norm (for symmetric positive
      definite A), or on the Euclidean error (otherwise). Infinite when A is seen to be indefinite.
    - `first_error`: the same bound for the guess that the solve started from.
    - `curvature`: upper bound on the smallest eigenvalue of D^-1 A, with D the lower bound on A:
      below 0.99 it contradicts D (what is missing to 1 is left to rounding). There it is known to
      within a factor 2, from the smallest Ritz value.
    - `largest`: largest `|Ap| / |p|` met, a lower bound on the norm of A.
    - `rounding`: the part of `error` that rounding may account for.
    - `iterations`, `products`: iterations, and products with A (one more for a guess, one more for
      a recomputed residual).
    - `converged`: whether `error <= tolerance`.
    - `memory`: the preconditioner that was given as `memory`, with what this solve taught it.
    """

    x: Vector
    residual: Vector
    error: Float[Array, ""]
    first_error: Float[Array, ""]
    curvature: Float[Array, ""]
    largest: Float[Array, ""]
    rounding: Float[Array, ""]
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    converged: Bool[Array, ""]
    memory: Recycled | None = None

    @classmethod
    def by_residual(
        cls,
        x: Vector,
        residual: Vector,
        norm: Array,
        first: Array,
        wanted: Array,
        c: Array,
        iterations: Array,
        products: Array,
    ) -> "LinearResult":
        """Of a method that knows no more than the `norm` of the residual, that of the guess
        (`first`), how small it was `wanted`, and that errors are at most `1 / c` times as large."""
        norm = jnp.where(jnp.isfinite(norm), norm, jnp.inf)
        zero = jnp.zeros((), x.dtype)
        return cls(
            x=x,
            residual=residual,
            error=norm / c,
            first_error=first / c,
            curvature=jnp.full((), jnp.inf, x.dtype),
            largest=zero,
            rounding=zero,
            iterations=iterations,
            products=products,
            converged=(norm <= 1.01 * wanted) & (norm < jnp.inf),
        )


class CG(eqx.Module):
    """Preconditioned conjugate gradients with Gauss-Radau error bounds.

    With a diagonal `lower_bound` D <= A the energy norm of the error is bounded at every iteration
    by the smaller of `|r|_{D^-1}` and the Gauss-Radau quadrature of Meurant and Tichy (*Numerical
    Algorithms* 62, 2013), which costs no further products. The bounds are rigorous when D is:
    rounding, which keeps residuals from falling below about `eps |A| |x|`, is part of them. A D
    that is too large shows in the sign of the Radau weights (the smallest Ritz value lies below it)
    long before the error bounds go wrong by much.

    - `max_steps`: the most iterations.
    - `quadrature`: `False` stops on `|r|_{D^-1}` alone.

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> result = CG()(lambda v: A @ v, jnp.ones(3), lower_bound=jnp.ones(3), tolerance=1e-10)
    >>> bool(result.converged), int(result.iterations)
    (True, 3)
    """

    max_steps: int | Int[Array, ""] = 1000
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
        preconditioner: Vector | Operator | None = None,
        exact_residual: bool = True,
        memory: Recycled | None = None,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `lower_bound`: diagonal D with D <= A.
        - `preconditioner`: diagonal P that resembles A (default D), or a callable `r -> P^-1 r`,
          linear, symmetric and positive definite, of which no more is known: errors are bounded by
          `|r|_{D^-1}` then, and rounding is judged by the products met, which with a good P are
          small ones. Nothing bounds the error where P turns out not to be definite.
        - `exact_residual`: `False` saves a product and returns that of the recurrence.
        - `memory`: a [`Recycled`][] preconditioner on the same D, used in place of a diagonal one.
        """
        dtype = b.dtype
        d = lower_bound
        plain = preconditioner is None and memory is None
        unknown = memory is None and callable(preconditioner)
        # The spectrum of P^-1 A lies above this, unless nothing is known of it.
        if memory is not None:
            floor, inverse = memory.floor, memory.solve
        elif callable(preconditioner):
            floor, inverse = jnp.ones((), dtype), preconditioner
        else:
            p_diag = d if preconditioner is None else preconditioner
            floor, inverse = jnp.min(d / p_diag), lambda r: r / p_diag
        floor = (1 - 1e-7) * floor
        kept = None if memory is None else jnp.zeros((2, memory.pairs, b.size), dtype)
        least, tiny = jnp.min(d), jnp.finfo(dtype).tiny
        eps = jnp.finfo(dtype).eps
        count = jnp.result_type(int)

        def dual(rz: Array, r: Vector) -> Array:
            """|r|_{D^-1} squared. Passes over vectors are what an iteration costs beside A."""
            return rz if plain else jnp.dot(r, r / d)

        def bound(gamma: Array, rz: Array, r: Vector, kept: Array | None) -> Array:
            """Squared upper bound on the error from the Radau weight and from |r|_{D^-1}, or the
            best that the products kept allow: the floor of a learned preconditioner is low."""
            simple = dual(rz, r) if kept is None else dual_norm_given(r, d, *kept) ** 2
            radau = jnp.where(gamma > 0, gamma * rz, jnp.inf)
            return jnp.minimum(simple, radau) if self.quadrature and not unknown else simple

        def definite(r: Vector, z: Vector) -> Bool[Array, ""]:
            """Whether nothing shows that P is not positive definite."""
            given = memory is None and preconditioner is not None
            return jnp.isfinite(definite_norm(r, z)) if given else jnp.array(True)

        r = b if guess is None else b - operator(guess)
        products = jnp.array(0 if guess is None else 1, count)
        # Squares of the scaled residual neither overflow nor vanish.
        scale = jnp.max(jnp.abs(r))
        scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
        r, x = r / scale, jnp.zeros_like(b)
        guess_norm = jnp.zeros((), dtype) if guess is None else jnp.linalg.norm(guess / scale)
        asked = jnp.asarray(tolerance, dtype) / scale
        r0, z = r, inverse(r)
        rz = jnp.dot(r, z)
        gamma = 1 / floor
        # Floors to compare the smallest Ritz value with; less than 1 leaves room for rounding.
        shares = 0.98 * 0.5 ** jnp.arange(24, dtype=dtype)
        first = bound(gamma, rz, r, kept)
        # Residuals cannot fall below this.
        negligible = (eps**2) * jnp.sum((b / scale) ** 2 / d)

        def rounding(x: Vector, largest: Array) -> Array:
            """The error that residuals wrong by 2 eps |A| |x| amount to."""
            size = guess_norm + jnp.sqrt(jnp.dot(x, x))
            return 2 * eps * largest * size / jnp.sqrt(least)

        def unfinished(carry: tuple) -> Bool[Array, ""]:
            x, r, _, rz, weights, gone, (_, largest), step, bad, kept = carry
            squared, unsure = bound(weights[0], rz, r, kept), rounding(x, largest)
            # What the error of the guess was: decrements so far plus what is left.
            wanted = jnp.maximum(asked, relative * jnp.sqrt(gone + squared))
            error = jnp.sqrt(squared)
            going = (error + unsure > wanted) & (error > 0.1 * unsure) & (rz > tiny)
            going = going & (dual(rz, r) > negligible)
            return going & (step < self.max_steps) & ~bad

        def body(carry: tuple) -> tuple:
            x, r, p, rz, (gamma, test), gone, (curvature, largest), step, _, kept = carry
            ap = operator(p)
            if kept is not None:
                kept = kept.at[:, step].set(jnp.stack([p, ap]), mode="drop")
            pap = jnp.dot(p, ap)
            pdp = jnp.maximum(jnp.dot(p, d * p), tiny)
            curvature = jnp.minimum(curvature, pap / pdp)
            # Where squares overflow or vanish the quotients of Rayleigh are what is known.
            seen = jnp.sqrt(jnp.dot(ap, ap) / jnp.dot(p, p))
            seen = jnp.where(jnp.isfinite(seen), seen, pap / pdp * least)
            largest = jnp.maximum(largest, seen)
            bad = ~(pap > 0)
            alpha = jnp.where(bad, 0, rz / jnp.where(bad, 1, pap))
            x, r = x + alpha * p, r - alpha * ap
            z = inverse(r)
            bad = bad | ~definite(r, z)
            rz_new = jnp.dot(r, z)
            beta = rz_new / rz

            def weight(gamma: Array, floor: Array) -> Array:
                rest = gamma - alpha
                return jnp.where(rest > 0, rest / (floor * rest + beta), jnp.nan)

            # The weights stay positive as long as the smallest Ritz value exceeds the floor.
            if not unknown:
                test = weight(test, shares * floor)
                low = jnp.min(jnp.where(jnp.isnan(test), shares, jnp.inf))
                curvature, gamma = jnp.minimum(curvature, low), weight(gamma, floor)
            weights = (gamma, test)
            seen = (curvature, largest)
            gone = gone + alpha * rz
            return x, r, z + beta * p, rz_new, weights, gone, seen, step + 1, bad, kept

        zero, inf = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype)
        bad = ~jnp.isfinite(rz) | ~definite(r, z)
        weights = (gamma, gamma / shares)
        start = (x, r, z, rz, weights, zero, (inf, zero), jnp.array(0, count), bad, kept)
        end = jax.lax.while_loop(unfinished, body, start)
        x, r, _, rz, (gamma, _), gone, (curvature, largest), steps, bad, kept = end
        squared = bound(gamma, rz, r, kept)
        if unknown:
            # No Ritz values, but a step of inverse iteration: its quotient leans to the smallest.
            xdx = jnp.dot(x, d * x)
            quotient = jnp.dot(x, r0 - r) / jnp.where(xdx > 0, xdx, 1)
            curvature = jnp.where(xdx > 0, jnp.minimum(curvature, quotient), curvature)
        error, unsure = scale * jnp.sqrt(squared), scale * rounding(x, largest)
        first_error = scale * jnp.sqrt(jnp.minimum(first, gone + squared))
        products = products + steps
        x, r = scale * x, scale * r
        if guess is not None:
            x = guess + x
        if exact_residual:
            true = b - operator(x)
            error = error + dual_norm(true - r, d)
            r, products = true, products + 1
        wanted = jnp.maximum(tolerance, relative * first_error)
        error, first_error = error + unsure, first_error + unsure
        lost = bad | jnp.isnan(error)
        error = jnp.where(lost, jnp.inf, error)
        first_error = jnp.where(lost, jnp.inf, first_error)
        return LinearResult(
            x,
            r,
            error,
            first_error,
            curvature,
            largest,
            unsure,
            steps,
            products,
            error <= 1.01 * wanted,
            memory if memory is None or kept is None else memory.learned(*kept),
        )
