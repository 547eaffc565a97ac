"""Levenberg-Marquardt steps in many lanes at once, as one state that is told residuals."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tolerax.inner.normal_equations import (
    NewtonStep,
    Normal,
    normal_equations,
    trust_region_step,
)
from tolerax.inner.rows import Jacobian, all_finite, only
from tolerax.status import PointStatus

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]
Flags = Bool[Array, " k"]


class Terms(eqx.Module):
    """What a problem in lanes consists of beside residuals: the weight of `ridge |w|^2 / 2`, and
    bounds (infinite where there are none)."""

    ridge: Lane
    lower: Rows
    upper: Rows


# After so many evaluations a lane that converges slowly takes second derivatives.
PATIENCE = 6


class Lanes(eqx.Module):
    """Where every lane is (`w`, its `cost`, the `normal` equations there), where it goes next
    (`trial`), and how it is doing.

    - `undamped`: the step without a trust region; its length in the energy norm, `decrement`, is
      the distance to the minimizer up to second order.
    - `predicted`: the decrease that the linear model expects of the trial.
    - `radius`: of the trust region; `damping`: what it came to.
    - `newton`: lanes that take second derivatives; `active`: lanes that go on; `floored`: those
      that ended since rounding allows no progress.
    """

    w: Rows
    cost: Lane
    normal: Normal
    undamped: NewtonStep
    trial: Rows
    predicted: Lane
    radius: Lane
    evaluations: Int[Array, " k"]
    damping: Lane
    newton: Flags
    active: Flags
    floored: Flags

    @property
    def decrement(self) -> Lane:
        """The distance to the minimizer in the energy norm, up to second order."""
        return self.undamped.decrement

    def status(self, tolerance: Lane) -> Any:
        """The `PointStatus` of every lane."""

        def one(cost: Array, decrement: Array, floored: Array, tolerance: Array) -> Any:
            status = PointStatus.where(floored, PointStatus.floor, PointStatus.inaccurate)
            status = PointStatus.where(decrement <= tolerance, PointStatus.ok, status)
            return PointStatus.where(jnp.isfinite(cost), status, PointStatus.failed)

        return jax.vmap(one)(self.cost, self.decrement, self.floored, tolerance)


def first_lanes(w: Rows, radius: Lane) -> Lanes:
    """Before anything is known: the start is the first trial."""
    count, n = w.shape
    inf = jnp.full(count, jnp.inf, w.dtype)
    square = jnp.zeros((count, n, n), w.dtype)
    false, zero = jnp.zeros(count, bool), jnp.zeros_like(w)
    normal = Normal(
        gram=square,
        gradient=zero,
        scale=jnp.ones_like(w),
        free=jnp.ones(w.shape, bool),
        condition=inf,
        ill=false,
        root=square,
        image=zero,
    )
    return Lanes(
        w=w,
        cost=inf,
        normal=normal,
        undamped=NewtonStep(zero, square, inf),
        trial=w,
        predicted=inf,
        radius=radius,
        evaluations=jnp.zeros(count, jnp.int32),
        newton=false,
        damping=jnp.zeros_like(inf),
        active=~false,
        floored=false,
    )


def told(
    lanes: Lanes,
    r: Float[Array, "k m"],
    J: Jacobian,
    terms: Terms,
    tolerance: Lane,
    curvature: Float[Array, "k n n"] | None = None,
) -> Lanes:
    """The lanes after residuals and Jacobian at their trials. Lanes that are not active stay."""
    x, eps = lanes.trial, jnp.finfo(lanes.w.dtype).eps
    cost = 0.5 * jnp.sum(r * r, axis=1) + 0.5 * terms.ridge * jnp.sum(x * x, axis=1)
    finite = jnp.isfinite(cost) & all_finite(J)
    # A lane that is not finite must not reach the factorizations that all lanes share.
    r, J = jnp.where(finite[:, None], r, 0), only(finite, J)

    def blocked(g: Rows) -> Bool[Array, "k n"]:
        return ((x <= terms.lower) & (g > 0)) | ((x >= terms.upper) & (g < 0))

    wanted = lanes.active & finite
    normal, undamped = normal_equations(r, J, x, terms.ridge, wanted, blocked, curvature)
    decrement = undamped.decrement

    first = lanes.cost == jnp.inf
    gain = lanes.cost - cost
    noise = 16 * eps * lanes.cost
    # Where costs cannot be told apart, the decrement decides: it still has digits.
    flat = ~first & (lanes.predicted <= noise)
    closer = decrement < lanes.decrement
    accept = finite & jnp.where(
        flat, closer & (gain >= -noise), first | (gain >= 1e-4 * lanes.predicted)
    )
    accept = accept & lanes.active
    ended = flat & ~(accept & (decrement <= 0.9 * lanes.decrement))

    ratio = gain / jnp.where(first, 1, lanes.predicted)
    moved = x - lanes.w
    length = _length(lanes.normal, moved)
    # Where a parabola through both costs and the slope has its minimum.
    slope = jnp.sum(lanes.normal.gradient * moved, axis=1)
    part = jnp.where(finite, -0.5 * slope / jnp.where(gain < 0, -gain - slope, -slope), 0.1)
    shorter = jnp.clip(part, 0.1, 0.5) * length
    longer = jnp.where(ratio > 0.75, jnp.maximum(3 * length, lanes.radius), lanes.radius)
    radius = jnp.where(accept & ~(ratio < 0.25), longer, shorter)
    radius = jnp.where(first | (accept & flat), lanes.radius, radius)

    now = _where(
        accept,
        (x, cost, normal, undamped),
        (lanes.w, lanes.cost, lanes.normal, lanes.undamped),
    )
    w, cost, normal, undamped = now
    decrement = undamped.decrement
    going = lanes.active & (decrement > tolerance) & jnp.isfinite(cost)
    trial, predicted, radius, damping = _proposed(
        normal, undamped, w, jnp.where(going, radius, jnp.inf), terms
    )
    still = jnp.all(trial == w, axis=1) | (predicted <= 0)
    done = (decrement <= tolerance) | ~jnp.isfinite(cost)
    floored = lanes.active & ~done & (ended | still)
    active = lanes.active & ~done & ~floored
    evaluations = lanes.evaluations + lanes.active
    slow = ~first & ~(accept & (decrement <= 0.3 * lanes.decrement)) & (evaluations >= PATIENCE)
    new = Lanes(
        w=w,
        cost=cost,
        normal=normal,
        undamped=undamped,
        trial=jnp.where(active[:, None], trial, w),
        predicted=predicted,
        radius=radius,
        damping=damping,
        evaluations=evaluations,
        newton=lanes.newton | slow,
        active=active,
        floored=floored,
    )
    return _where(lanes.active, new, lanes)


def _proposed(
    normal: Normal,
    undamped: NewtonStep,
    w: Rows,
    radius: Lane,
    terms: Terms,
) -> tuple[Rows, Lane, Lane, Lane]:
    """The next trial, the decrease that the linear model expects there, radius and damping."""

    def cut(state: tuple) -> Flags:
        # Where bounds cut a step off, its model may rise; a shorter one falls: as the radius goes
        # to 0 the step becomes that of a projected gradient.
        trial, predicted, _, _, count = state
        rises = (predicted <= 0) & jnp.any(trial != w, axis=1)
        return rises & (count < 30)

    def propose(state: tuple) -> tuple:
        _, _, radius, _, count = state
        radius = jnp.where(cut(state), 0.25 * radius, radius)
        p, damping = trust_region_step(normal, undamped, radius)
        trial = jnp.clip(w + p, terms.lower, terms.upper)
        s = trial - w
        curved = jnp.einsum("ki,kij,kj->k", s, normal.gram, s)
        predicted = -jnp.sum(normal.gradient * s, axis=1) - 0.5 * curved
        # An infinite radius cannot be halved.
        radius = jnp.where(predicted > 0, radius, jnp.minimum(radius, _length(normal, p)))
        return trial, predicted, radius, damping, count + 1

    zero = jnp.zeros_like(radius)
    again = lambda state: (state[-1] == 0) | jnp.any(cut(state))  # noqa: E731
    return jax.lax.while_loop(again, propose, (w, zero, radius, zero, 0))[:4]


def _length(normal: Normal, p: Rows) -> Lane:
    """`|S p|`, with the lengths S of the columns of J."""
    return jnp.linalg.norm(normal.scale * p, axis=1)


def _where(lanes: Flags, new: Any, old: Any) -> Any:
    """The new one in some lanes, the old one in the others."""

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(lanes.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(chosen, new, old)
