"""A trust region around the best point, with a quadratic model through values near it: the state
machine that `ModelTrustRegion` runs and `CDSM` searches with. Points are flat and in units of the
scale of each variable."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Start
from tolerax.inner.interpolation import Basis, Quadratic, basis
from tolerax.inner.trust_region import in_ball_and_box
from tolerax.solvers._common import Box, select
from tolerax.solvers._population import check_spread, scale_like
from tolerax.validation import check_integer, is_concrete

Scalar = Float[Array, ""]
Vector = Float[Array, " n"]
FAR = 2.0  # in radii: points farther than this are replaced before a model is blamed


class Sides(NamedTuple):
    """The bounds, in the same units as the points."""

    low: Vector
    high: Vector

    @property
    def fixed(self) -> Bool[Array, " n"]:
        """Coordinates without any room."""
        return self.high <= self.low


class Region(eqx.Module):
    """The points of the model, its Hessian, the radius, and the floor that the radius rests on
    while steps of its length still help."""

    points: Float[Array, "m n"]
    values: Float[Array, " m"]
    used: Bool[Array, " m"]
    H: Float[Array, "n n"]
    radius: Scalar
    floor: Scalar
    end: Scalar
    trial: Vector
    promised: Scalar
    influence: Float[Array, " m"]  # values of the Lagrange functions of the points at the trial
    slot: Int[Array, ""]  # the point that a step for the geometry replaces, else -1
    improve: Bool[Array, ""]  # the last step was bad
    shrink: Bool[Array, ""]  # ... and so short that the floor may fall
    slope: Scalar
    done: Bool[Array, ""]

    @property
    def best(self) -> Int[Array, ""]:
        """The index of the lowest value."""
        return jnp.argmin(jnp.where(self.used, self.values, jnp.inf))

    @property
    def center(self) -> Vector:
        """The point there."""
        return self.points[self.best]


def star(center: Vector, radius: Scalar, sides: Sides) -> Float[Array, "m n"]:
    """The center and two points on each axis through it: at `+-radius`, or, where a bound is near,
    both on the side with more room."""
    up, down = sides.high - center, center - sides.low
    roomy = jnp.where(up >= down, 1.0, -1.0).astype(center.dtype)
    room, rest = jnp.maximum(up, down), jnp.minimum(up, down)
    first = jnp.minimum(radius, room)
    other = jnp.where(rest >= 0.5 * first, -jnp.minimum(rest, radius), 0.5 * first)
    n = center.size
    ahead, back = jnp.diag(roomy * first), jnp.diag(roomy * other)
    points = center[None] + jnp.concatenate([jnp.zeros((1, n), center.dtype), ahead, back])
    return jnp.clip(points, sides.low[None], sides.high[None])


def opened(
    points: Float[Array, "k n"],
    values: Float[Array, " k"],
    sides: Sides,
    radius: Scalar,
    end: Scalar,
) -> Region:
    """A region begun with the points of a star."""
    k, n = points.shape
    dtype = points.dtype
    zero, false = jnp.zeros((), dtype), jnp.array(False)
    # Points on an axis without room coincide with the center.
    used = jnp.concatenate([jnp.ones(1, bool), ~sides.fixed, ~sides.fixed])
    return Region(
        points=points,
        values=believable(values),
        used=used,
        H=jnp.zeros((n, n), dtype),
        radius=radius,
        floor=radius,
        end=end,
        trial=points[0],
        promised=zero,
        influence=jnp.zeros(k, dtype),
        slot=jnp.array(-1),
        improve=false,
        shrink=false,
        slope=jnp.array(jnp.inf, dtype),
        done=false,
    )


def believable(values: Float[Array, " k"]) -> Float[Array, " k"]:
    """Values with those of failed points, which are infinite, put above all others: a wall, but one
    that a quadratic can have."""
    finite = jnp.isfinite(values)
    least = jnp.min(jnp.where(finite, values, jnp.inf))
    most = jnp.max(jnp.where(finite, values, -jnp.inf))
    wall = jnp.where(jnp.any(finite), most + (most - least), 0)
    return jnp.where(finite, values, wall)


def _model(region: Region, sides: Sides) -> tuple[Basis, Quadratic, Vector, Vector]:
    """The model around the center in units of the radius, and the bounds there."""
    c, r = region.center, region.radius
    shared = basis((region.points - c[None]) / r, region.used, sides.fixed)
    lowest = region.values[region.best]
    values = jnp.where(region.used, region.values - lowest, 0)
    model = shared.model(values, region.H * r * r)
    fine = jnp.all(jnp.isfinite(model.g)) & jnp.all(jnp.isfinite(model.H))
    model = select(fine, model, jax.tree.map(jnp.zeros_like, model))
    return shared, model, (sides.low - c) / r, (sides.high - c) / r


def planned(region: Region, sides: Sides) -> Region:
    """The region with its next trial point, or done."""

    def going(carry: tuple[Region, Array]) -> Array:
        region, ready = carry
        return ~ready & ~region.done

    def plan(carry: tuple[Region, Array]) -> tuple[Region, Array]:
        region, _ = carry
        r, c = region.radius, region.center
        shared, model, low, high = _model(region, sides)
        s = in_ball_and_box(model.g, model.H, jnp.ones((), r.dtype), low, high)
        promised = -(model.g @ s + 0.5 * (model.H @ s) @ s)
        lowest = region.values[region.best]
        rounding = jnp.finfo(r.dtype).eps * jnp.abs(lowest)
        short = (jnp.linalg.norm(s) * r < 0.5 * region.floor) | ~(promised > rounding)
        away = jnp.where(region.used, jnp.linalg.norm(region.points - c[None], axis=1), 0)
        farthest = jnp.argmax(away)
        far = away[farthest] > FAR * r
        geometry = (short | region.improve) & far
        step = ~geometry & ~short & ~region.shrink

        def for_geometry(_: None) -> tuple[Vector, Array]:
            return _spreading(shared, farthest, away[farthest] / r, region, low, high), farthest

        stay = (s, jnp.array(-1))
        s, slot = jax.lax.cond(geometry, for_geometry, lambda _: stay, None)
        slope = jnp.linalg.norm(jnp.clip(-model.g, low, high)) / r
        falls = ~geometry & ~step
        lower = _lower_floor(region)
        over = falls & (region.floor <= region.end)
        region = dataclasses.replace(
            region,
            H=model.H / (r * r),
            trial=jnp.clip(c + r * s, sides.low, sides.high),
            promised=jnp.where(geometry, 0, promised),
            influence=shared.lagrange_at(s),
            slot=slot.astype(region.slot.dtype),
            improve=jnp.array(False),
            shrink=region.shrink & geometry,
            slope=slope,
            radius=jnp.where(falls, jnp.maximum(0.5 * region.floor, lower), r),
            floor=jnp.where(falls, lower, region.floor),
            done=over,
        )
        return region, geometry | step

    return jax.lax.while_loop(going, plan, (region, jnp.array(False)))[0]


def _lower_floor(region: Region) -> Scalar:
    """Powell's rule: by tens, and the last ones so that the end is met."""
    ratio = region.floor / region.end
    last = jnp.where(ratio <= 250, jnp.sqrt(ratio) * region.end, 0.1 * region.floor)
    return jnp.where(ratio <= 16, region.end, last)


def _spreading(
    shared: Basis, slot: Array, away: Scalar, region: Region, low: Vector, high: Vector
) -> Vector:
    """A step, in units of the radius, to where the Lagrange function of a point is largest."""
    _, g, H = shared.lagrange(slot)
    length = jnp.maximum(jnp.minimum(0.1 * away, 0.5), region.floor / region.radius)
    length = jnp.minimum(length, 1.0)
    least = lambda sign: in_ball_and_box(sign * g, sign * H, length, low, high)  # noqa: E731
    up, down = jax.lax.map(least, jnp.array([-1, 1], g.dtype))
    size = lambda s: jnp.abs(g @ s + 0.5 * (H @ s) @ s)  # noqa: E731
    return jnp.where(size(up) >= size(down), up, down)


def told(region: Region, value: Scalar) -> Region:
    """The region after the value of its trial point."""
    best = region.best
    lowest = region.values[best]
    others = jnp.where(region.used, region.values, -jnp.inf)
    # A failed point counts as one above all others.
    wall = jnp.max(others) + (jnp.max(others) - lowest)
    value = jnp.where(jnp.isfinite(value), value, wall)
    step = region.slot < 0
    length = jnp.linalg.norm(region.trial - region.points[best])
    ratio = (lowest - value) / jnp.where(region.promised > 0, region.promised, 1)
    half = 0.5 * region.radius
    grown = jnp.where(ratio <= 0.7, jnp.maximum(half, length), jnp.maximum(half, 2 * length))
    radius = jnp.where(ratio <= 0.1, jnp.minimum(half, length), grown)
    radius = jnp.where(radius <= 1.5 * region.floor, region.floor, radius)
    lower = value < lowest
    slot = jnp.where(step, _leaving(region, lower), region.slot)
    bad = step & (ratio <= 0.1)
    return dataclasses.replace(
        region,
        points=region.points.at[slot].set(region.trial),
        values=region.values.at[slot].set(value),
        used=region.used.at[slot].set(True),
        radius=jnp.where(step, radius, region.radius),
        improve=bad,
        shrink=jnp.where(
            step, bad & ~lower & (region.radius <= region.floor), region.shrink & ~lower
        ),
    )


def _leaving(region: Region, lower: Array) -> Int[Array, ""]:
    """The slot for the trial point: an empty one, or that of the point which is far away and whose
    Lagrange function is large there, so that the others stay well placed."""
    c, r = region.center, region.radius
    there = jnp.abs(region.influence)
    from_where = jnp.where(lower, region.trial, c)
    away = jnp.linalg.norm(region.points - from_where[None], axis=1)
    reach = jnp.maximum(0.1 * r, region.floor)
    weight = there * jnp.maximum(1, (away / reach) ** 4)
    weight = jnp.where(jnp.isfinite(weight), weight, away)
    # The lowest point stays.
    keep = (jnp.arange(weight.size) == region.best) & ~lower
    weight = jnp.where(keep, -1, weight)
    return jnp.argmax(jnp.where(region.used, weight, jnp.inf))


def inserted(region: Region, point: Vector, value: Scalar, sides: Sides) -> Region:
    """The region with a point of others, which is lower than all of its own."""
    c, r = region.center, region.radius
    shared = basis((region.points - c[None]) / r, region.used, sides.fixed)
    there = shared.lagrange_at((point - c) / r)
    region = dataclasses.replace(region, trial=point, influence=there)
    slot = _leaving(region, jnp.array(True))
    return dataclasses.replace(
        region,
        points=region.points.at[slot].set(point),
        values=region.values.at[slot].set(value),
        used=region.used.at[slot].set(True),
        radius=jnp.maximum(r, jnp.linalg.norm(point - c)),
        improve=jnp.array(False),
        shrink=jnp.array(False),
    )


def check_fields(owner: Any, *counts: str) -> None:
    """Raise for a `radius`, a `tol` or `counts` that a run could not go by."""
    check_spread(owner.radius, "radius")
    if is_concrete(owner.tol) and not 0 < owner.tol < 1:
        raise ValueError(
            f"tol is {owner.tol}: it is the last radius in units of the first, so give a number "
            "between 0 and 1."
        )
    for name in counts:
        if getattr(owner, name) is not None:
            check_integer(name, getattr(owner, name))


def first_radius(radius: PyTree, start: Start, box: Box) -> Float[Array, " n"]:
    """The unit of each variable."""
    x0, _ = ravel_pytree(start.x)
    if radius is not None:
        return scale_like(radius, start.x, "radius")
    width = box.upper - box.lower
    free = 0.5 * jnp.maximum(1.0, jnp.abs(x0))
    return jnp.where(jnp.isfinite(width) & (width > 0), 0.2 * width, free)
