"""Where an attack looks: directions from a gradient and from linearized constraints."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Evaluation
from tolerax.inner.lbfgs import Pairs, inverse_product
from tolerax.inner.positive_bases import rotation

ROWS = 8  # constraints that a step looks at: the tightest ones
KEPT = 2  # of them, remembered for later points
CUTS = 8  # remembered tangents in all
SWEEPS = 100  # of coordinate descent for their multipliers


class Tangents(eqx.Module):
    """The tightest constraints as `values + rows d <= 0` (`= 0` where `equal`), for a step d from
    x. `places` and `signs` say which entries of the constraints they are, and on which side."""

    x: Float[Array, " n"]
    values: Float[Array, " rows"]
    rows: Float[Array, "rows n"]
    equal: Bool[Array, " rows"]
    places: Int[Array, " rows"]
    signs: Float[Array, " rows"]


class Held(eqx.Module):
    """What later steps need of earlier ones: the multipliers of some constraints, what else there
    was to the gradient of the Lagrangian, and tangents at earlier points.

    A constraint that is a maximum, as of a network's outputs, has a kink where it matters: steps
    within the tangent of one side only find the other side, again and again.
    """

    places: Int[Array, " rows"]
    weights: Float[Array, " rows"]
    rest: Float[Array, " n"]
    points: Float[Array, "cuts n"]
    values: Float[Array, " cuts"]
    rows: Float[Array, "cuts n"]
    of: Int[Array, " cuts"]
    signs: Float[Array, " cuts"]

    def forgets(self, flag: Bool[Array, ""]) -> "Held":
        """The same without tangents where the flag is set."""
        signs = jnp.where(flag, 0, self.signs)
        return eqx.tree_at(lambda h: h.signs, self, signs)


def none_held(x: Float[Array, " n"], constrained: bool) -> Held:
    """Nothing yet."""
    rows, cuts = (ROWS, CUTS) if constrained else (0, 0)
    real = lambda *shape: jnp.zeros(shape, x.dtype)  # noqa: E731
    places = lambda count: jnp.zeros(count, jnp.int32)  # noqa: E731
    n = x.size
    return Held(
        places(rows),
        real(rows),
        real(n),
        real(cuts, n),
        real(cuts),
        real(cuts, n),
        places(cuts),
        real(cuts),
    )


def _outside(evaluation: Evaluation, limits: tuple[PyTree, PyTree]) -> tuple[Array, Array]:
    """How far the constraints at the first point of a batch are below their lower and above their
    upper bounds."""
    values = jax.tree.map(lambda c: c[0], evaluation.constraints)
    shapes = jax.tree.map(jnp.shape, values)
    c, _ = ravel_pytree(values)
    low, high = (ravel_pytree(jax.tree.map(jnp.broadcast_to, s, shapes))[0] for s in limits)
    return low - c, c - high


def tangents(
    evaluation: Evaluation,
    limits: tuple[PyTree, PyTree],
    unit: Float[Array, " n"],
    x: Float[Array, " n"],
) -> Tangents:
    """The constraints at the first point of a batch, which is x in units of the variables."""
    below, above = _outside(evaluation, limits)
    side = above >= below
    out, places = jax.lax.top_k(jnp.where(side, above, below), min(ROWS, side.size))
    # Fewer constraints than rows: the others are those of no constraint.
    more = ROWS - places.size
    places = jnp.pad(places, (0, more), constant_values=side.size).astype(jnp.int32)
    out = jnp.pad(out, (0, more), constant_values=-jnp.inf).astype(unit.dtype)
    real = places < side.size
    signs = jnp.where(real, jnp.where(side.at[places].get(mode="clip"), 1.0, -1.0), 0.0)
    signs = signs.astype(unit.dtype)
    equal = real & (below == -above).at[places].get(mode="clip")
    one = lambda place, sign: weighted(evaluation, place[None], sign[None], unit)  # noqa: E731
    return Tangents(x, out, jax.vmap(one)(places, signs), equal, places, signs)


def with_earlier(
    tight: Tangents, held: Held, evaluation: Evaluation, limits: tuple[PyTree, PyTree]
) -> Tangents:
    """Tangents also at earlier points, nowhere above the constraints here."""
    below, above = _outside(evaluation, limits)
    here = jnp.where(held.signs > 0, above[held.of], below[held.of]).astype(tight.x.dtype)
    there = held.values + jnp.sum(held.rows * (tight.x[None] - held.points), axis=1)
    values = jnp.where(held.signs != 0, jnp.minimum(here, there), -jnp.inf)
    both = lambda one, two: jnp.concatenate([one, two])  # noqa: E731
    return Tangents(
        tight.x,
        both(tight.values, values),
        both(tight.rows, held.rows),
        both(tight.equal, jnp.zeros(CUTS, bool)),
        both(tight.places, held.of),
        both(tight.signs, held.signs),
    )


def remembered(held: Held, tight: Tangents, y: Float[Array, " all"]) -> Held:
    """The multipliers, and the tightest tangents in place of the oldest."""
    kept = slice(0, KEPT)
    new = lambda old, fresh: jnp.roll(old, KEPT, axis=0).at[kept].set(fresh)  # noqa: E731
    return Held(
        tight.places[:ROWS],
        tight.signs[:ROWS] * y[:ROWS],
        y[ROWS:] @ tight.rows[ROWS:],
        new(held.points, jnp.broadcast_to(tight.x, (KEPT, tight.x.size))),
        new(held.values, tight.values[kept]),
        new(held.rows, tight.rows[kept]),
        new(held.of, tight.places[kept]),
        # An equality is no maximum.
        new(held.signs, jnp.where(tight.equal[kept], 0, tight.signs[kept])),
    )


def weighted(
    evaluation: Evaluation,
    places: Int[Array, " rows"],
    weights: Float[Array, " rows"],
    unit: Float[Array, " n"],
) -> Float[Array, " n"]:
    """The gradient of a weighted sum of constraints at the first point of a batch."""
    values = jax.tree.map(lambda c: c[0], evaluation.constraints)
    c, unravel = ravel_pytree(values)
    each = unravel(jnp.zeros_like(c).at[places].add(weights.astype(c.dtype), mode="drop"))
    assert evaluation.jacobian is not None
    slope, _ = ravel_pytree(evaluation.jacobian.rmv(each))
    return unit * slope.astype(unit.dtype)


def multipliers(
    gradient: Float[Array, " n"], tight: Tangents, inverse: Callable[[Array], Array]
) -> Float[Array, " rows"]:
    """Multipliers of the step that minimizes `g'd + d'Bd / 2` within the tangents, where `inverse`
    is the product with the inverse of B.

    Coordinate descent on the dual. They are bounded, so that there is a step also where the
    tangents have no point in common.
    """
    a = tight.rows
    through = jax.vmap(inverse)(a)
    m = through @ a.T
    values = jnp.where(jnp.isfinite(tight.values), tight.values, 0)
    along = through @ gradient
    diagonal = jnp.diagonal(m)
    real = (diagonal > 0) & jnp.isfinite(tight.values)
    divisor = jnp.where(real, diagonal, 1)
    # A hundred times what the tangent would need if it were alone.
    most = jnp.where(real, 1e2 * (jnp.abs(values) + jnp.abs(along)) / divisor, 0)
    least = jnp.where(tight.equal, -most, 0)

    def entry(i: Any, y: Array) -> Array:
        step = (values[i] - along[i] - m[i] @ y) / divisor[i]
        return y.at[i].set(jnp.clip(y[i] + step, least[i], most[i]))

    sweep = lambda _, y: jax.lax.fori_loop(0, a.shape[0], entry, y)  # noqa: E731
    return jax.lax.fori_loop(0, SWEEPS, sweep, jnp.zeros_like(values))


class Directions(eqx.Module):
    """Steps from a point: `normal - length * along[kind]`, where `normal` leads to the tangents and
    the others along them; beside the gradient of the Lagrangian and its multipliers, and how large
    a penalty of the violation must be for the quasi-Newton step."""

    normal: Float[Array, " n"]
    along: Float[Array, "kinds n"]
    slope: Float[Array, " n"]
    total: Float[Array, " n"]
    multipliers: Float[Array, " rows"]
    needed: Float[Array, ""]


def directions(
    gradient: Float[Array, " n"],
    tight: Tangents | None,
    pairs: Pairs,
    momentum: Float[Array, " n"],
    length: Float[Array, ""],
    blocked: Callable[[Array], Array],
) -> Directions:
    """Signs, gradient and momentum, as long as a vector of signs, and the quasi-Newton step.

    - `length`: how far the gradient is to be followed.
    - `blocked`: which variables a gradient would push over a bound they are at.
    """
    g = gradient
    root = jnp.sqrt(jnp.asarray(g.size, g.dtype))
    size = jnp.linalg.norm(g)
    # Without pairs the step is as long as the other directions.
    scale = root / jnp.where(size > 0, size, 1)
    inverse = lambda z, free: inverse_product(pairs, z, free, lambda r: scale * r)  # noqa: E731
    plain = lambda z, free: length * scale * jnp.where(free, z, 0)  # noqa: E731
    step, total, free, y = _within(g, tight, inverse, blocked)
    downhill, lagrangian, _, _ = _within(g, tight, plain, blocked)
    normal, needed = jnp.zeros_like(g), jnp.zeros((), g.dtype)
    if tight is not None:
        # Where the tangents have no point in common, multipliers are only as large as they may be.
        left = jnp.max(tight.values - tight.rows @ step)
        met = left <= 0.1 * jnp.maximum(jnp.max(tight.values), 0) + 1e-6
        needed = jnp.where(met, 2 * jnp.sum(jnp.abs(y)), 0)
        back = multipliers(normal, tight, lambda a: jnp.where(free, a, 0))
        normal = -jnp.where(free, back @ tight.rows, 0)
    slope = jnp.where(blocked(lagrangian), 0, lagrangian)
    size = jnp.linalg.norm(slope)
    slope = slope / jnp.where(size > 0, size, 1)
    momentum = 0.9 * momentum + slope
    swing = jnp.where(blocked(momentum), 0, momentum)
    size = jnp.linalg.norm(swing)
    swing = root * swing / jnp.where(size > 0, size, 1)
    downhill = (normal + downhill) / jnp.where(length > 0, length, 1)
    usable = jnp.all(jnp.isfinite(step)) & jnp.any(step != 0)
    step = jnp.where(usable, normal + step, downhill)
    along = jnp.stack([jnp.sign(slope), downhill, swing, step])
    return Directions(normal, along, slope, total, y, needed)


def _within(
    g: Array,
    tight: Tangents | None,
    inverse: Callable[[Array, Array], Array],
    blocked: Callable[[Array], Array],
) -> tuple[Array, Array, Array, Array]:
    """A step (to be subtracted) within the tangents, the gradient of the Lagrangian, the variables
    that are free, and the multipliers."""
    total, y = g, jnp.zeros(0 if tight is None else tight.values.size, g.dtype)
    free = ~blocked(total)
    if tight is not None:
        # Which variables are at bounds depends on the multipliers.
        for _ in range(2):
            y = multipliers(g, tight, lambda a, free=free: inverse(a, free))
            total = g + y @ tight.rows
            free = ~blocked(total)
    return inverse(total, free), total, free, y


def orthogonal_rows(
    key: PRNGKeyArray, count: int, x: Float[Array, " n"]
) -> Float[Array, "count n"]:
    """Random unit vectors, each n in turn orthogonal."""
    keys = jax.random.split(key, -(-count // x.size))
    bases = jax.vmap(lambda key: rotation(key, x.size, x.dtype))(keys)
    return bases.reshape(-1, x.size)[:count]


def estimated(rungs: Float[Array, "twice n"], energy: Float[Array, " more"]) -> Float[Array, " n"]:
    """A gradient from central differences: of the points the first half is on one side, the other
    on the other. Of all that agree best with the differences the shortest, made longer where there
    are fewer directions than variables."""
    samples, n = rungs.shape[0] // 2, rungs.shape[1]
    steps = (rungs[:samples] - rungs[samples:]) / 2
    differences = (energy[:samples] - energy[samples : 2 * samples]) / 2
    known = jnp.isfinite(differences)
    steps = jnp.where(known[:, None], steps, 0)
    found = jnp.linalg.lstsq(steps, jnp.where(known, differences, 0))[0]
    return n / min(samples, n) * found


def penalty_for(
    needed: Float[Array, ""],
    penalty: Float[Array, ""],
    least: ArrayLike,
    violation: Float[Array, ""],
    before: Float[Array, ""],
    feasible_within: ArrayLike,
) -> Float[Array, ""]:
    """The next penalty: so that the minimum of the sum is where the constraints hold, but little
    more, since along a curved constraint a large one allows short steps only.

    It follows what is `needed`; at feasible points it may fall, down to `least`; where the
    violation has not halved since `before` it grows.
    """
    low = violation <= feasible_within
    lasting = ~low & (violation > 0.5 * before)
    floor = jnp.where(low, 0.25 * penalty, jnp.where(lasting, 1.5 * penalty, penalty))
    floor = jnp.maximum(floor, least)
    wanted = jnp.clip(needed, floor, jnp.maximum(10 * penalty, floor))
    return jnp.where(jnp.isfinite(wanted), wanted, penalty)
