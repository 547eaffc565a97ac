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

from tolerax.contracts import Evaluation, Start
from tolerax.inner.constrained_step import constrained_step
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


class Limits(NamedTuple):
    """What constraints must lie between."""

    lower: Float[Array, " p"]
    upper: Float[Array, " p"]

    @classmethod
    def of(cls, start: Start) -> "Limits":
        """Those of a start, flat; none where there are no constraints."""
        x, _ = ravel_pytree(start.x)
        if start.constraint_bounds is None:
            return cls(jnp.zeros(0, x.dtype), jnp.zeros(0, x.dtype))
        lower, upper = (ravel_pytree(side)[0] for side in start.constraint_bounds)
        return cls(lower.astype(x.dtype), upper.astype(x.dtype))

    def violation(self, rows: Float[Array, "*m p"]) -> Float[Array, "*m"]:
        """How far the farthest row is outside."""
        if not self.lower.size:
            return jnp.zeros(rows.shape[:-1], rows.dtype)
        lower, upper = (jnp.broadcast_to(side, rows.shape) for side in self)
        out = jnp.maximum(jnp.maximum(lower - rows, rows - upper), 0)
        return jnp.max(out, axis=-1, initial=0)


def rows_of(evaluation: Evaluation, like: Float[Array, " k"]) -> Float[Array, "k p"]:
    """The constraint values of a batch, a row for each of its points."""
    leaves = jax.tree.leaves(evaluation.constraints)
    flat = [leaf.reshape(like.size, -1).astype(like.dtype) for leaf in leaves]
    return jnp.concatenate([jnp.zeros((like.size, 0), like.dtype), *flat], axis=1)


class Region(eqx.Module):
    """The points of the model, its Hessians, the radius, and the floor that the radius rests on
    while steps of its length still help.

    Of constraints each has a model of its own. Points are ranked by their `merits`, which are
    values plus `penalty` times violation; the penalty exceeds the sum of the multipliers, so that
    its minima are those of the constrained problem (Han, Mangasarian, *Mathematical Programming*
    17, 1979).
    """

    points: Float[Array, "m n"]
    values: Float[Array, " m"]
    rows: Float[Array, "m p"]
    used: Bool[Array, " m"]
    H: Float[Array, "n n"]
    bent: Float[Array, "p n n"]
    multipliers: Float[Array, " p"]
    penalty: Scalar
    limits: Limits
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

    def merit(self, values: Float[Array, "*m"], rows: Float[Array, "*m p"]) -> Float[Array, "*m"]:
        """What points are ranked by."""
        if not self.limits.lower.size:
            return values
        return values + self.penalty * self.limits.violation(rows)

    @property
    def merits(self) -> Float[Array, " m"]:
        """Those of the points of the model."""
        return self.merit(self.values, self.rows)

    @property
    def best(self) -> Int[Array, ""]:
        """The index of the lowest merit."""
        return jnp.argmin(jnp.where(self.used, self.merits, jnp.inf))

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


def unopened(points: Float[Array, "k n"], sides: Sides, limits: Limits, end: Scalar) -> Region:
    """A region of radius 1 whose points, those of a star, have no values yet."""
    k, n = points.shape
    p, dtype = limits.lower.size, points.dtype
    zero, one, false = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.array(False)
    # Points on an axis without room coincide with the center.
    used = jnp.concatenate([jnp.ones(1, bool), ~sides.fixed, ~sides.fixed])
    return Region(
        points=points,
        values=jnp.zeros(k, dtype),
        rows=jnp.zeros((k, p), dtype),
        used=used,
        H=jnp.zeros((n, n), dtype),
        bent=jnp.zeros((p, n, n), dtype),
        multipliers=jnp.zeros(p, dtype),
        penalty=zero,
        limits=limits,
        radius=one,
        floor=one,
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


def opened(
    old: Region,
    points: Float[Array, "k n"],
    values: Float[Array, " k"],
    rows: Float[Array, "k p"],
    sides: Sides,
) -> Region:
    """A region begun with the points of a star, of the radius and the penalty of the old one."""
    blank = unopened(points, sides, old.limits, old.end)
    known = jnp.isfinite(values)
    least = jnp.argmin(jnp.where(known, old.merit(values, rows), jnp.inf))
    return dataclasses.replace(
        blank,
        values=believable(values),
        # Nothing is known of constraints where a point failed: the wall of the values is enough.
        rows=jnp.where(known[:, None], rows, rows[least]),
        multipliers=old.multipliers,
        penalty=old.penalty,
        radius=old.radius,
        floor=old.radius,
    )


def believable(values: Float[Array, " k"]) -> Float[Array, " k"]:
    """Values with those of failed points, which are infinite, put above all others: a wall, but one
    that a quadratic can have."""
    finite = jnp.isfinite(values)
    least = jnp.min(jnp.where(finite, values, jnp.inf))
    most = jnp.max(jnp.where(finite, values, -jnp.inf))
    wall = jnp.where(jnp.any(finite), most + (most - least), 0)
    return jnp.where(finite, values, wall)


class Models(NamedTuple):
    """Models around the center in units of the radius, and the bounds there."""

    shared: Basis
    objective: Quadratic
    constraints: Quadratic
    low: Vector
    high: Vector


def _models(region: Region, sides: Sides) -> Models:
    c, r, best = region.center, region.radius, region.best
    shared = basis((region.points - c[None]) / r, region.used, sides.fixed)

    def model(column: tuple[Array, Array]) -> Quadratic:
        values, H = column
        found = shared.model(jnp.where(region.used, values - values[best], 0), H * r * r)
        fine = jnp.all(jnp.isfinite(found.g)) & jnp.all(jnp.isfinite(found.H))
        return select(fine, found, jax.tree.map(jnp.zeros_like, found))

    # Of the objective only differences matter.
    objective = model((region.values, region.H))._replace(c=jnp.zeros((), c.dtype))
    n, p = c.size, region.limits.lower.size
    empty = jnp.zeros(0, c.dtype)
    constraints = Quadratic(empty, jnp.zeros((0, n), c.dtype), jnp.zeros((0, n, n), c.dtype))
    if p:
        constraints = jax.lax.map(model, (region.rows.T, region.bent))
        constraints = constraints._replace(c=region.rows[best])
    return Models(shared, objective, constraints, (sides.low - c) / r, (sides.high - c) / r)


def _step(region: Region, models: Models) -> tuple[Vector, Region]:
    """The step that the models promise most of, and the region with the multipliers and the penalty
    that go with it."""
    f, c = models.objective, models.constraints
    if not region.limits.lower.size:
        s = in_ball_and_box(f.g, f.H, jnp.ones((), f.g.dtype), models.low, models.high)
        return s, region
    limits = region.limits
    sides = (models.low, models.high)
    found = constrained_step(f, c, *limits, *sides, region.multipliers)
    s = found.s
    now, then = limits.violation(c.c), limits.violation(c(s))
    gained = now - then
    # The penalty exceeds the multipliers, so that minima of the merit are those of the problem;
    # but not those of a step that the ball binds, which grow without limit as it hardly reaches
    # the constraints: there it is large enough for a decrease, and where no step was found.
    lost = f(s)
    enough = jnp.where(gained > 0, 2 * lost / jnp.where(gained > 0, gained, 1), 0)
    size = jnp.sum(jnp.abs(found.multipliers))
    within = jnp.linalg.norm(s) < 0.99
    needed = jnp.where(within, size, jnp.minimum(size, enough))
    needed = jnp.where(found.found, needed, enough)
    raised = jnp.where(region.penalty < needed, 2 * needed, region.penalty)
    # Where the objective does not change any will do.
    raised = jnp.where((raised == 0) & (gained > 0) & (lost == 0), 1, raised)
    multipliers = jnp.where(found.found, found.multipliers, 0)
    return s, dataclasses.replace(region, multipliers=multipliers, penalty=raised)


def planned(region: Region, sides: Sides) -> Region:
    """The region with its next trial point, or done."""

    def going(carry: tuple[Region, Array]) -> Array:
        region, ready = carry
        return ~ready & ~region.done

    def plan(carry: tuple[Region, Array]) -> tuple[Region, Array]:
        region, _ = carry
        r, c, best = region.radius, region.center, region.best
        models = _models(region, sides)
        s, region = _step(region, models)
        f, rows = models.objective, models.constraints
        violation = region.limits.violation
        promised = region.penalty * (violation(rows.c) - violation(rows(s))) - f(s)
        # With a larger penalty another point may be the best.
        anew = region.best != best if region.multipliers.size else jnp.array(False)
        rounding = jnp.finfo(r.dtype).eps * jnp.abs(region.merits[best])
        short = (jnp.linalg.norm(s) * r < 0.5 * region.floor) | ~(promised > rounding)
        away = jnp.where(region.used, jnp.linalg.norm(region.points - c[None], axis=1), 0)
        farthest = jnp.argmax(away)
        far = away[farthest] > FAR * r
        geometry = (short | region.improve) & far & ~anew
        step = ~geometry & ~short & ~region.shrink & ~anew

        def for_geometry(_: None) -> tuple[Vector, Array]:
            return _spreading(models, farthest, away[farthest] / r, region), farthest

        stay = (s, jnp.array(-1))
        s, slot = jax.lax.cond(geometry, for_geometry, lambda _: stay, None)
        pull = f.g
        if region.multipliers.size:
            pull = pull + region.multipliers @ (rows.g + rows.H @ s)
        slope = jnp.linalg.norm(jnp.clip(-pull, models.low, models.high)) / r
        falls = ~geometry & ~step & ~anew
        lower = _lower_floor(region)
        over = falls & (region.floor <= region.end)
        region = dataclasses.replace(
            region,
            H=f.H / (r * r),
            bent=rows.H / (r * r),
            trial=jnp.clip(c + r * s, sides.low, sides.high),
            promised=jnp.where(geometry, 0, promised),
            influence=models.shared.lagrange_at(s),
            slot=slot.astype(region.slot.dtype),
            improve=region.improve & anew,
            shrink=region.shrink & (geometry | anew),
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


def _spreading(models: Models, slot: Array, away: Scalar, region: Region) -> Vector:
    """A step, in units of the radius, to where the Lagrange function of a point is largest."""
    _, g, H = models.shared.lagrange(slot)
    low, high = models.low, models.high
    length = jnp.maximum(jnp.minimum(0.1 * away, 0.5), region.floor / region.radius)
    length = jnp.minimum(length, 1.0)
    least = lambda sign: in_ball_and_box(sign * g, sign * H, length, low, high)  # noqa: E731
    up, down = jax.lax.map(least, jnp.array([-1, 1], g.dtype))
    size = lambda s: jnp.abs(g @ s + 0.5 * (H @ s) @ s)  # noqa: E731
    return jnp.where(size(up) >= size(down), up, down)


def told(region: Region, value: Scalar, rows: Float[Array, " p"]) -> Region:
    """The region after the value, and the constraints, of its trial point."""
    best = region.best
    merits = region.merits
    lowest = merits[best]
    others = jnp.where(region.used, merits, -jnp.inf)
    # A failed point counts as one above all others.
    wall = jnp.max(others) + (jnp.max(others) - lowest)
    failed = ~jnp.isfinite(value)
    rows = jnp.where(failed, region.rows[best], rows)
    value = jnp.where(failed, wall, value)
    merit = region.merit(value, rows)
    step = region.slot < 0
    length = jnp.linalg.norm(region.trial - region.points[best])
    ratio = (lowest - merit) / jnp.where(region.promised > 0, region.promised, 1)
    half = 0.5 * region.radius
    grown = jnp.where(ratio <= 0.7, jnp.maximum(half, length), jnp.maximum(half, 2 * length))
    radius = jnp.where(ratio <= 0.1, jnp.minimum(half, length), grown)
    radius = jnp.where(radius <= 1.5 * region.floor, region.floor, radius)
    lower = merit < lowest
    slot = jnp.where(step, _leaving(region, lower), region.slot)
    bad = step & (ratio <= 0.1)
    return dataclasses.replace(
        region,
        points=region.points.at[slot].set(region.trial),
        values=region.values.at[slot].set(value),
        rows=region.rows.at[slot].set(rows),
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


def inserted(
    region: Region, point: Vector, value: Scalar, rows: Float[Array, " p"], sides: Sides
) -> Region:
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
        rows=region.rows.at[slot].set(rows),
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
