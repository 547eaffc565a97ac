"""Error bounds of the inexact oracle, in two norms.

Both bound the same three errors from achieved residuals: that of the state, of the value and of the
gradient. `Energy` measures in the norm of the lower-level Hessian, `Euclidean` divides by constants
as the published bounds do.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from tolerax.inner.bounds import excess, growth, second_growth
from tolerax.inner.estimates import largest_singular_value

Scalar = Float[Array, ""]
Vector = Float[Array, " n"]
SAFETY = 4.0  # estimates of upper bounds are raised by this factor


class CrossBounds(eqx.Module):
    """Bounds on the cross derivative F_x(y, x) at a point (y, q), in the energy norm of H = F_y.

    Norms of what is like x are the dual norms of the metric of the problem, |.|_2 without one.

    - `adjoint`: B1 >= `|F_x' w|_2` for all w with `w'Hw <= 1`.
    - `state`: B2 >= `|d/dy [grad_x J - F_x' q] e|_2` for all e with `e'He <= 1`.
    - `both`: B12 with `|(F_x(y + e) - F_x(y))' w|_2 <= B12 |e|_H |w|_H`.
    - `third`: B3 with `|d2/dy2 [grad_x J - F_x' q] [e, v]|_2 <= B3 M |v|_2 |q|_H |e|_H` at every y'
      with M |y' - y|_2 <= 1, for H = H(y') and M the self-concordance: how fast what `state`
      bounds can change. 0 where F_x is at most linear in y and grad_x J does not depend on it.
    """

    adjoint: Scalar
    state: Scalar
    both: Scalar
    third: Scalar

    def __init__(
        self, adjoint: ArrayLike, state: ArrayLike, both: ArrayLike, third: ArrayLike = 0.0
    ):
        dtype = jnp.result_type(adjoint, state, both)
        self.adjoint = jnp.asarray(adjoint, dtype)
        self.state = jnp.asarray(state, dtype)
        self.both = jnp.asarray(both, dtype)
        self.third = jnp.asarray(third, dtype)


class Errors(eqx.Module):
    """Bounds on the errors of value and gradient; `from_state + from_adjoint` bounds the latter.

    `per_state` and `per_adjoint`: how much of an error in the linearized state, and in its adjoint,
    a product with the Hessian can show. `contradicted`: what was seen contradicts a constant.
    `adjoint_norm`: that of the adjoint q, where `|F_x' q|_2 <= per_adjoint * adjoint_norm` is
    claimed and no estimate.
    """

    value: Scalar
    from_state: Scalar
    from_adjoint: Scalar
    per_state: Scalar
    per_adjoint: Scalar
    contradicted: Array | bool = False
    adjoint_norm: Scalar | None = None


def energy_errors(
    *,
    distance: Scalar,
    exponent: Scalar,
    adjoint_error: Scalar,
    q_norm: Scalar,
    q_bend: Scalar,
    smoothness: Scalar,
    cross: CrossBounds,
) -> Errors:
    """Bounds in the energy norm of H = H(y).

    With e = y - y*, t = `distance` >= |e|_H, a = `exponent` >= M |e|_2, sigma = `adjoint_error` >=
    |q - H^-1 grad J|_H, A = `smoothness` (|Hess_yy J| <= A H), |q|_H = `q_norm` and M |q|_2 =
    `q_bend`:

    - third order: D^3 h[e, q, w] is at most M |e|_2 |q|_H |w|_H and at most M |q|_2 |e|_H |w|_H in
      the Hessian where it is taken, which is at most exp(a) H. With c = min(a |q|_H, M |q|_2 t)
      hence `|(H* - H) q|_{H^-1} <= c (exp(a) - 1) / a` and, with G the mean Hessian over the
      segment, `|q'(H - G) e| <= c t (exp(a) - 1 - a) / a^2`;
    - value: `J(y) - q'r - f = s'e + q'(H - G)e - R` with s = grad J - H q and |R| <= A t^2 / 2,
      hence at most sigma t + c t (exp(a) - 1 - a) / a^2 + A t^2 / 2;
    - adjoint: H*(q - q*) = grad J(y) - grad J(y*) - s + (H* - H) q with H* >= exp(-a) H, hence
      |q - q*|_H <= exp(a) (sigma + A t + c (exp(a) - 1) / a);
    - gradient: z - grad phi is the change of grad_x J - F_x' q from y* to y, at most
      B2 t + B3 excess(a) |q|_H t, and F_x(y*)'(q* - q), at most (B1 + B12 t) |q - q*|_H.
    """
    t, a = distance, exponent
    change = jnp.minimum(_times(a, q_norm), q_bend * t)
    curved = _times(second_growth(a), change * t)
    value = adjoint_error * t + curved + 0.5 * smoothness * t * t
    from_state = _times(jnp.exp(a), smoothness * t + _times(growth(a), change))
    from_adjoint = _times(jnp.exp(a), adjoint_error)
    factor = cross.adjoint + cross.both * t
    third = _times(cross.third, q_norm * t)
    third = jnp.where((third > 0) & (a > 1), jnp.inf, third)
    direct = cross.state * t + _times(excess(a), third)
    return Errors(
        value,
        direct + _times(factor, from_state),
        _times(factor, from_adjoint),
        cross.state + _times(cross.adjoint, smoothness + q_bend),
        cross.adjoint,
    )


def _times(a: Scalar, b: Scalar) -> Scalar:
    """The product of two bounds. Far from the solution exp(a) overflows and there is no bound, but
    nothing times infinity is nothing."""
    return jnp.where((a == 0) | (b == 0), jnp.zeros_like(a * b), a * b)


def estimate_cross(at: Any, lower_bound: Vector, y: Vector, q: Vector) -> tuple[CrossBounds, int]:
    """Estimates of the cross bounds by power iteration with D in place of H (D <= H makes the
    norms larger), raised by a safety factor; and how many products they took."""
    q_norm = jnp.linalg.norm(jnp.sqrt(lower_bound) * q)
    return estimate_cross_in(at, lambda u: u / lower_bound, y, q, q_norm)


def estimate_cross_in(
    at: Any, inverse: Callable[[Vector], Vector], y: Vector, q: Vector, q_norm: Scalar
) -> tuple[CrossBounds, int]:
    """The same in the norm of R, given `inverse` R^-1 and the norm of q."""
    start = jnp.cos(1.0 + jnp.arange(at.flat_x.size, dtype=y.dtype))
    gradient_x = lambda y, q: jax.grad(at.lagrangian, argnums=2)(y, q, at.flat_x)  # noqa: E731

    def norm_of(function: Any, point: Vector) -> Scalar:
        forward = jax.linearize(function, point)[1]
        backward = jax.linear_transpose(forward, point)
        value, _ = largest_singular_value(
            lambda u: backward(u)[0],
            lambda e: at.riesz_x(forward(e)),
            start,
            dual=inverse,
            norm=at.norm_x,
        )
        return SAFETY * value

    adjoint = norm_of(lambda q: gradient_x(y, q), q)
    state = norm_of(lambda y: gradient_x(y, q), y)
    both = state / jnp.maximum(q_norm, jnp.finfo(y.dtype).tiny)
    both = jnp.where(q_norm > 0, both, adjoint)
    return CrossBounds(adjoint, state, both, third=both), 8
