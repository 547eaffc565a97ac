"""Covering direct search: model steps, polls on random bases, and a cover that leaves no hole."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.covering import farthest_points
from tolerax.inner.positive_bases import rotation
from tolerax.solvers._branches import when
from tolerax.solvers._common import Box, lost_in, select
from tolerax.solvers._kinks import Bend, first_size
from tolerax.solvers._model_steps import (
    Limits,
    Region,
    Sides,
    check_fields,
    first_radius,
    inserted,
    opened,
    planned,
    rows_of,
    star,
    told,
    unopened,
)
from tolerax.solvers._population import batch_query, energies, flat, largest_error
from tolerax.status import Status
from tolerax.validation import check_options

STAR, SEARCH, POLL = range(3)
# What a poll without success leaves of its radius where points have no value or lie across a kink.
SHRUNK = 0.85


class Incumbent(eqx.Module):
    """A point with its value, its constraints and their violation."""

    x: Float[Array, " n"]
    value: Float[Array, ""]
    rows: Float[Array, " p"]
    violation: Float[Array, ""]

    def merit(self, penalty: Float[Array, ""]) -> Float[Array, ""]:
        """The value with the penalty of its violation; infinite where nothing is known."""
        known = self.value < jnp.inf
        return jnp.where(known, self.value + penalty * self.violation, jnp.inf)


class CDSMState(eqx.Module):
    """The two incumbents (the best feasible point, and the infeasible one from which it may be
    approached), the radius of the poll, the model, all points evaluated, and the points asked for.
    """

    feasible: Incumbent
    infeasible: Incumbent
    radius: Float[Array, ""]
    region: Region
    seen: Float[Array, "capacity n"]
    count: Int[Array, ""]
    queue: Float[Array, "q n"]
    values: Float[Array, " q"]
    rows: Float[Array, "q p"]
    length: Int[Array, ""]
    position: Int[Array, ""]
    purpose: Int[Array, ""]
    before: Float[Array, ""]
    origin: Incumbent
    blur: Float[Array, ""]
    size: Float[Array, " k"]
    bend: Bend
    kinked: Bool[Array, ""]
    missing: Bool[Array, ""]
    resolution: Float[Array, ""]
    failed_polls: Int[Array, ""]
    iteration: Int[Array, ""]
    sides: Sides
    scale: Float[Array, " n"]
    box: Box
    key: PRNGKeyArray
    done: Bool[Array, ""]
    status: Any

    @property
    def x(self) -> Float[Array, "capacity n"]:
        """All points evaluated so far, flat; rows from `count` on are empty."""
        return self.seen * self.scale[None]


class CDSM(Solver):
    """Covering direct search: derivative-free minimization of functions that may be discontinuous
    and may fail, with bounds and constraints.

    An iteration *searches*, by steps of a quadratic model in a trust region, as long as they help
    at the present resolution. Then it *covers* and *polls*: one batch holds the point of the box
    `center +- covering` that is farthest from everything evaluated, and 2n points on a random
    orthogonal basis and its negative, at the distance of the poll radius (on the axes, where a
    bound is that near). The poll radius doubles when that gave a sufficient decrease, in
    proportion to its square, and is halved otherwise, or falls to that of the model. Where points
    of the poll had no value, or second differences over two polls are those of a kink, it shrinks
    by 0.85, so that it stays up while more than one poll in five succeeds. The run ends when a poll
    failed at the radius `tol`: `Status.converged_estimated`, or `Status.stalled` where a point of
    it had no value or there is a kink, for then few directions say little.

    What is proved of this kind of method (in the source) is asymptotic: as the poll radius falls to
    0 the points become dense around its limit, so that the limit is a local minimizer even of a
    discontinuous function, as long as better values are not confined to thin sets. A finite run
    knows the ball only to the `covering_resolution` of its history, and in more than about 10
    dimensions that stays near 1 whatever the budget: there the cover certifies nothing in practice.

    - `radius`: the first poll radius, a number or a pytree like x, which is also the unit of each
      variable; by default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for
      variables without. - `tol`: the last one, in units of the first.
    - `covering`: half the side of the box that is covered, in units of `radius`.
    - `batch`: how many points are asked for at once; by default all of a poll. With fewer, the rest
      of a poll is left out once one point gave a sufficient decrease.
    - `memory`: how many evaluated points the cover remembers.
    - `feasible_within`: the largest `violation` of a feasible point. Infeasible points never become
      the solution; polls go to the best feasible point and, by the progressive barrier, to the
      infeasible one of lowest value among those of ever smaller violation. Searches model each
      constraint, as [`ModelTrustRegion`][] does; a run whose last poll found a point that is lower
      with its penalty, but infeasible, ends with `Status.stalled`.
    - `accuracy`: what is asked of problems whose values are not exact.

    The history has `poll_radius`, `covering_resolution` (the distance, in units of the covering
    box, from the last covering point to the nearest point evaluated) and `failed_polls`.

    Source: Audet, Bouchet, Bourdin (arXiv 2401.07097); Audet, Dennis (*SIAM J. Optim.* 20, 2009)
    for the progressive barrier.

    >>> import jax.numpy as jnp, tolerax
    >>> jump = lambda x: jnp.sum((x - 1) ** 2) + jnp.where(x[0] < 0.7, 5.0, 0.0)
    >>> problem = tolerax.Objective(jump, bounds=(-2.0, 2.0))
    >>> solution = tolerax.solve(problem, tolerax.CDSM(), jnp.array([-1.0, 0.0]))
    >>> bool(jnp.allclose(solution.x, 1, atol=1e-3))
    True
    """

    radius: PyTree = None
    tol: float = 1e-6
    covering: float = 1.0
    batch: int | None = eqx.field(static=True, default=None)
    memory: int = eqx.field(static=True, default=2000)
    feasible_within: float = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-6, 1e-6))

    def __check_init__(self):
        check_fields(self, "batch", "memory")
        check_options(self, positive="covering", at_least_0="feasible_within")

    @property
    def honours_bounds(self) -> bool:
        return True

    @property
    def honours_constraints(self) -> bool:
        return True

    @property
    def feasibility(self) -> Any:
        return self.feasible_within

    # -- the start --------------------------------------------------------------------------------

    def init(self, start: Start) -> CDSMState:
        x0, _ = ravel_pytree(start.x)
        box = Box.of(start)
        scale = first_radius(self.radius, start, box)
        sides = Sides(box.lower / scale, box.upper / scale)
        center = jnp.clip(x0 / scale, sides.low, sides.high)
        one, inf = jnp.ones((), x0.dtype), jnp.array(jnp.inf, x0.dtype)
        first = star(center, one, sides)
        n = x0.size
        # A cover, a poll of the best point and one of the infeasible one.
        slots = 4 * n + 1 if start.constraint_bounds is not None else 2 * n + 1
        limits, zero = Limits.of(start), jnp.array(0)
        nobody = Incumbent(center, inf, jnp.zeros_like(limits.lower), inf)
        return CDSMState(
            feasible=nobody,
            infeasible=nobody,
            radius=one,
            region=unopened(first, sides, limits, jnp.asarray(self.tol, x0.dtype)),
            seen=jnp.zeros((self.memory, n), x0.dtype),
            count=zero,
            queue=jnp.pad(first, ((0, slots - first.shape[0]), (0, 0))),
            values=jnp.full(slots, inf),
            rows=jnp.zeros((slots, limits.lower.size), x0.dtype),
            length=jnp.array(first.shape[0]),
            position=zero,
            purpose=jnp.array(STAR),
            before=inf,
            origin=nobody,
            blur=jnp.zeros_like(one),
            size=jnp.zeros(1 + limits.lower.size, x0.dtype),
            bend=Bend.unknown(jnp.append(inf, nobody.rows)),
            kinked=jnp.array(False),
            missing=jnp.array(False),
            resolution=inf,
            failed_polls=zero,
            iteration=zero,
            sides=sides,
            scale=scale,
            box=box,
            key=start.key,
            done=jnp.array(False),
            status=Status.running,
        )

    # -- ask and tell -----------------------------------------------------------------------------

    def _index(self, state: CDSMState) -> Int[Array, " batch"]:
        batch = state.queue.shape[0] if self.batch is None else self.batch
        return state.position + jnp.arange(batch)

    def ask(self, state: CDSMState) -> Query:
        index = self._index(state)
        x = state.queue[jnp.minimum(index, state.queue.shape[0] - 1)] * state.scale[None]
        x = jnp.clip(x, state.box.lower[None], state.box.upper[None])
        query = batch_query(x, state.box, self.accuracy)
        return dataclasses.replace(query, mask=index < state.length)

    def tell(self, state: CDSMState, query: Query, evaluation: Evaluation) -> CDSMState:
        assert query.mask is not None
        value = energies(query, evaluation, state.radius.dtype)
        finite = jnp.isfinite(value)
        rows = rows_of(evaluation, value)
        violation = jnp.where(finite, state.region.limits.violation(rows), jnp.inf)
        slots, capacity = state.queue.shape[0], state.seen.shape[0]
        index = jnp.where(query.mask, self._index(state), slots)
        points = flat(query.x) / state.scale[None]
        told = (points, value, rows, violation)
        feasible = violation <= self.feasible_within
        place = jnp.where(
            query.mask, (state.count + jnp.cumsum(query.mask) - 1) % capacity, capacity
        )
        new = jnp.sum(query.mask)
        state = dataclasses.replace(
            state,
            values=state.values.at[index].set(value, mode="drop"),
            rows=state.rows.at[index].set(rows, mode="drop"),
            seen=state.seen.at[place].set(points, mode="drop"),
            count=state.count + new,
            position=state.position + new,
            blur=largest_error(query, evaluation, state.blur),
            size=first_size(value, rows, state.size, state.count == 0),
            missing=state.missing | jnp.any(query.mask & ~finite),
            feasible=_best_feasible(state.feasible, *told, feasible, state.region.penalty),
            infeasible=_next_infeasible(state.infeasible, *told, ~feasible),
        )
        polling = state.purpose == POLL
        ended = (state.position >= state.length) | (polling & self._succeeded(state))
        return when(ended, self._next, lambda s: s, state)

    # -- what follows -----------------------------------------------------------------------------

    def _merits(self, state: CDSMState) -> Array:
        """What the model ranks the points by that were asked for."""
        merits = state.region.merit(state.values, state.rows)
        return jnp.where(jnp.isfinite(state.values), merits, jnp.inf)

    def _center(self, state: CDSMState) -> Incumbent:
        """The best feasible point, or the least infeasible one as long as there is none."""
        return select(state.feasible.value < jnp.inf, state.feasible, state.infeasible)

    def _standing(self, state: CDSMState) -> Array:
        """What a success lowers: the merit of the feasible point, or the violation while there is
        none. (A value that falls because the violation grows within its tolerance is no gain.)"""
        known, penalty = state.feasible.value < jnp.inf, state.region.penalty
        return jnp.where(known, state.feasible.merit(penalty), state.infeasible.violation)

    def _succeeded(self, state: CDSMState) -> Array:
        """Whether the poll gave a sufficient decrease, or a first feasible point."""
        first = (state.feasible.value < jnp.inf) & jnp.isinf(state.before)
        return (self._standing(state) < state.before - _enough(state)) | first

    def _next(self, state: CDSMState) -> CDSMState:
        """Search as long as the model helps at its resolution; else cover and poll."""
        state = dataclasses.replace(state, iteration=state.iteration + 1)
        state = when(state.purpose == POLL, self._after_poll, lambda s: s, state)
        opening = state.purpose == STAR
        floor = state.region.floor
        region = self._told(state)
        reopens = (state.purpose == POLL) & region.done & (state.radius > 2 * region.end)
        reopens = reopens & self._lower(state)
        region = planned(region, state.sides)
        nothing = ~jnp.isfinite(self._center(state).value)
        falls = (region.floor < floor) & (state.purpose == SEARCH)
        polls = (falls | region.done) & ~opening
        over = state.done | nothing
        state = dataclasses.replace(
            state,
            region=region,
            done=over,
            status=Status.where(nothing, Status.all_failed, state.status),
        )
        state = when(polls, self._poll, self._search, state)
        return when(reopens & ~over, self._reopen, lambda s: s, state)

    def _lower(self, state: CDSMState, by: ArrayLike = 0) -> Array:
        """Whether a point that was asked for is lower than those of the model."""
        return jnp.min(self._merits(state)) < state.region.merits[state.region.best] - by

    def _told(self, state: CDSMState) -> Region:
        """The region after what was evaluated, whatever for."""
        old = state.region
        k = old.points.shape[0]

        def from_star(_: Any) -> Region:
            return opened(old, state.queue[:k], state.values[:k], state.rows[:k], state.sides)

        def from_search(_: Any) -> Region:
            return told(old, state.values[0], state.rows[0])

        def from_poll(_: Any) -> Region:
            i = jnp.argmin(self._merits(state))
            new = inserted(old, state.queue[i], state.values[i], state.rows[i], state.sides)
            return select(self._lower(state), new, old)

        other = lambda _: when(state.purpose == SEARCH, from_search, from_poll, None)  # noqa: E731
        return when(state.purpose == STAR, from_star, other, None)

    def _asking(self, state: CDSMState, points: Array, count: Any, purpose: int) -> CDSMState:
        extra = state.queue.shape[0] - points.shape[0]
        return dataclasses.replace(
            state,
            queue=jnp.pad(points, ((0, extra), (0, 0))),
            values=jnp.full_like(state.values, jnp.inf),
            length=jnp.asarray(count, state.length.dtype),
            position=jnp.zeros_like(state.position),
            purpose=jnp.asarray(purpose, state.purpose.dtype),
            before=self._standing(state),
            origin=self._center(state),
            blur=jnp.zeros_like(state.blur),
            missing=jnp.array(False),
        )

    def _search(self, state: CDSMState) -> CDSMState:
        return self._asking(state, state.region.trial[None], 1, SEARCH)

    def _reopen(self, state: CDSMState) -> CDSMState:
        """A new model around a point that a poll or the cover found."""
        radius = jnp.minimum(state.radius, 1)
        points = star(state.region.center, radius, state.sides)
        region = dataclasses.replace(state.region, radius=radius)
        state = dataclasses.replace(state, region=region)
        return self._asking(state, points, points.shape[0], STAR)

    def _poll(self, state: CDSMState) -> CDSMState:
        """The covering point and the poll, in one batch."""
        n = state.queue.shape[1]
        center = self._center(state)
        turn, shift = jax.random.split(jax.random.fold_in(state.key, state.iteration))
        low, high = state.sides
        cover = farthest_points(
            shift,
            center.x,
            jnp.asarray(self.covering, center.x.dtype),
            state.seen,
            mask=jnp.arange(state.seen.shape[0]) < state.count,
            lower=low,
            upper=high,
        )
        points = [cover.points, self._directions(state, turn, center.x)]
        count = 1 + 2 * n
        if state.queue.shape[0] > count:
            both = jnp.isfinite(state.feasible.value) & jnp.isfinite(state.infeasible.value)
            points.append(self._directions(state, turn, state.infeasible.x))
            count = jnp.where(both, count + 2 * n, count)
        state = self._asking(state, jnp.concatenate(points), count, POLL)
        return dataclasses.replace(state, resolution=cover.distance[0])

    def _directions(self, state: CDSMState, key: PRNGKeyArray, x: Array) -> Array:
        """2n points at the poll radius: on the axes where a bound is that near."""
        low, high = state.sides
        near = jnp.any((high - x < state.radius) | (x - low < state.radius))
        n = x.size
        q = jnp.where(near, jnp.eye(n, dtype=x.dtype), rotation(key, n, x.dtype).T)
        points = x[None] + state.radius * jnp.concatenate([q, -q])
        return jnp.clip(points, low[None], high[None])

    def _judged(self, state: CDSMState) -> CDSMState:
        """Whether second differences over this poll and one at least twice as long tell a kink."""
        n, origin = state.queue.shape[1], state.origin
        poll = slice(1, 2 * n + 1)
        table = jnp.concatenate([state.values[:, None], state.rows], axis=1)[poll]
        middle = jnp.append(origin.value, origin.rows)
        about = (state.radius, state.size, state.blur)
        new = Bend.of(origin.x, middle, state.queue[poll], table, *about)
        apart = new.length <= 0.5 * state.bend.length
        first = ~jnp.isfinite(state.bend.length) | (new.length > state.bend.length)
        return dataclasses.replace(
            state,
            kinked=jnp.where(apart & ~first, new.kinked(state.bend), state.kinked),
            bend=select((apart | first) & jnp.isfinite(new.length), new, state.bend),
        )

    def _after_poll(self, state: CDSMState) -> CDSMState:
        success = self._succeeded(state)
        state = select(success, state, self._judged(state))
        slow = state.missing | state.kinked
        # A model that has come further says that the poll may too, but not of points without value
        # or of kinks.
        floor = jnp.where(slow, state.radius, state.region.floor)
        # At the edge of a region without values, which no model knows, a basis holds a direction of
        # descent by chance. With success doubling the radius and failure times s, it falls for
        # chances below log s / log(s / 2): 0.19 in place of 0.5 (Gratton, Royer, Vicente, Zhang,
        # SIAM J. Optim. 25, 2015).
        shrunk = jnp.where(slow, SHRUNK, 0.5) * state.radius
        smaller = jnp.maximum(jnp.minimum(shrunk, floor), self.tol)
        last = ~success & (state.radius <= self.tol)
        radius = jnp.where(success, jnp.minimum(2 * state.radius, 1), smaller)
        known = state.feasible.value < jnp.inf
        # Infeasible points lie higher too, by the penalty, unless a kink of the constraints or a
        # model that knows nothing of them hides a descent.
        doubtful = slow | self._lower(state, by=_enough(state))
        fine = Status.where(doubtful, Status.stalled, Status.converged_estimated)
        fine = Status.where(lost_in(state.feasible.x, state.radius), Status.accuracy_floor, fine)
        ended = Status.where(known, fine, Status.infeasible)
        return dataclasses.replace(
            state,
            radius=radius,
            failed_polls=state.failed_polls + ~success,
            done=last,
            status=Status.where(last, ended, state.status),
        )

    # -- the end ----------------------------------------------------------------------------------

    def terminate(self, state: CDSMState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: CDSMState) -> dict[str, Array]:
        return {
            "iteration": state.iteration,
            "poll_radius": state.radius,
            "covering_resolution": state.resolution,
            "failed_polls": state.failed_polls,
        }


def _enough(state: CDSMState) -> Array:
    """The sufficient decrease."""
    return 1e-4 * jnp.minimum(state.radius, 1) ** 2


def _best_feasible(
    now: Incumbent,
    points: Array,
    value: Array,
    rows: Array,
    violation: Array,
    feasible: Array,
    penalty: Array,
) -> Incumbent:
    """The lowest of the feasible points, with a penalty on what remains of their violation."""
    merit = jnp.where(feasible, value + penalty * violation, jnp.inf)
    i = jnp.argmin(merit)
    new = Incumbent(points[i], value[i], rows[i], violation[i])
    return select(merit[i] < now.merit(penalty), new, now)


def _next_infeasible(
    now: Incumbent, points: Array, value: Array, rows: Array, violation: Array, outside: Array
) -> Incumbent:
    """Of the infeasible points that violate less the lowest, so that the barrier closes; the same
    violation counts with a lower value."""
    lower = (violation == now.violation) & (value < now.value)
    less = outside & ((violation < now.violation) | lower)
    value = jnp.where(less & jnp.isfinite(violation), value, jnp.inf)
    i = jnp.argmin(value)
    new = Incumbent(points[i], value[i], rows[i], violation[i])
    return select(value[i] < jnp.inf, new, now)
