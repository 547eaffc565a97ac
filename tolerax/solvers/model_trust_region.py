"""Derivative-free minimization by quadratic models in a trust region."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.evolution import sample_size
from tolerax.inner.positive_bases import positive_basis
from tolerax.solvers import _exploration as exploration
from tolerax.solvers._best import Best
from tolerax.solvers._branches import chosen, when
from tolerax.solvers._common import Box, lost_in
from tolerax.solvers._exploration import Exploration
from tolerax.solvers._kinks import Bend, first_size
from tolerax.solvers._model_steps import (
    Limits,
    Region,
    Sides,
    check_fields,
    first_radius,
    opened,
    planned,
    rows_of,
    star,
    told,
    unopened,
)
from tolerax.solvers._population import batch_query, energies, largest_error
from tolerax.status import Status
from tolerax.validation import check_options

STAR, STEP, POLL, GENERATION = range(4)
# Multiples of n + 1 points after which local and global search take turns.
LOCAL, GLOBAL = 10, 30
# The second length of a poll, in units of the first.
NEARER = 0.1


class ModelState(eqx.Module):
    """The region, what is being asked of it, and what is known elsewhere.

    `queue` holds the points asked for, `values` and `rows` what the objective and the constraints
    are there, `count` how many there are and `position` how many were told; `purpose` says what
    they are for.
    """

    region: Region
    queue: Float[Array, "q n"]
    values: Float[Array, " q"]
    rows: Float[Array, "q p"]
    members: Int[Array, " q"]
    count: Int[Array, ""]
    position: Int[Array, ""]
    purpose: Int[Array, ""]
    elsewhere: Exploration | None
    best: Best
    blur: Float[Array, ""]
    size: Float[Array, " k"]
    guard: Float[Array, ""]
    spent: Int[Array, ""]
    turn: Int[Array, ""]
    iteration: Int[Array, ""]
    sides: Sides
    scale: Float[Array, " n"]
    box: Box
    key: PRNGKeyArray
    done: Bool[Array, ""]
    status: Any

    @property
    def x(self) -> Float[Array, "m n"]:
        """The points of the model, flat."""
        return self.region.points * self.scale[None]


class ModelTrustRegion(Solver):
    """Derivative-free minimization: a quadratic model through 2n + 1 values, minimized in a trust
    region that grows while the model is right and shrinks where it is wrong.

    Of all quadratics through the values the model is the one whose Hessian changes least. Points
    far away are replaced, one at a time, by ones at which the model is least determined, before
    the radius shrinks for a model that was bad. Every point lies within the bounds.

    Constraints, equalities too, have a model each. A step minimizes the model of the objective
    where those of the constraints hold, or nearly, and is judged by the value plus a penalty times
    the largest violation; the penalty exceeds the sum of the multipliers.

    The run ends when the radius has reached `tol` and a poll of 2n random orthogonal directions
    around the best point, at the distances `sqrt(tol)` and a tenth of it, found no lower value,
    with its penalty (with one, it goes on from there): `Status.converged_estimated`, or
    `Status.infeasible`, or `Status.stalled` where some point of that poll failed, as at the edge of
    a region without values, or where second differences over the two distances are those of a kink:
    there few directions descend, and that none was lower says little.

    - `radius`: the first radius, a number or a pytree like x, which is also the unit of each
      variable; by default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for
      variables without. - `tol`: the last radius, in units of the first.
    - `explore`: what to do with the budget that is left when the region has converged, or has spent
      25 (n + 1) points: look elsewhere by CMA-ES, of which a quadratic fitted to the last points
      ranks most of the sample, and take turns. Such a run ends with its budget.
    - `batch`: how many points may be asked for at once: those of the first model, of a poll, of a
      generation. It changes no iterate.
    - `feasible_within`: the largest `violation` of a feasible point; what violates more is never
      the solution if anything feasible was seen.
    - `accuracy`: what is asked of problems whose values are not exact.

    Points that fail count as being as high as the highest of the model.

    Source: Powell (NA2009/06, "The BOBYQA algorithm"; *Mathematical Programming* 100, 2004); Hansen
    (GECCO 2019) for `explore`; for constraints Powell ("A direct search optimization method that
    models the objective and constraint functions by linear interpolation", 1994), with quadratics.

    >>> import jax.numpy as jnp, tolerax
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solution = tolerax.solve(
    ...     tolerax.Objective(rosenbrock), tolerax.ModelTrustRegion(), jnp.array([-1.2, 1.0])
    ... )
    >>> bool(jnp.allclose(solution.x, 1, atol=1e-4)), int(solution.work.points) < 250
    (True, True)
    """

    radius: PyTree = None
    tol: float = 1e-6
    explore: bool = eqx.field(static=True, default=False)
    batch: int = eqx.field(static=True, default=1)
    feasible_within: float = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-6, 1e-6))

    def __check_init__(self):
        check_fields(self, "batch")
        check_options(self, at_least_0="feasible_within")

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

    def init(self, start: Start) -> ModelState:
        x0, _ = ravel_pytree(start.x)
        box = Box.of(start)
        scale = first_radius(self.radius, start, box)
        sides = Sides(box.lower / scale, box.upper / scale)
        center = jnp.clip(x0 / scale, sides.low, sides.high)
        one = jnp.ones((), x0.dtype)
        first = star(center, one, sides)
        size = 2 * sample_size(x0.size)
        slots = max(first.shape[0], size if self.explore else 4 * x0.size)
        extra = slots - first.shape[0]
        limits, zero, inf = Limits.of(start), jnp.array(0), jnp.array(jnp.inf, x0.dtype)
        return ModelState(
            region=unopened(first, sides, limits, self._end(one)),
            queue=jnp.pad(first, ((0, extra), (0, 0))),
            values=jnp.full(slots, inf),
            rows=jnp.zeros((slots, limits.lower.size), x0.dtype),
            members=jnp.arange(slots),
            count=jnp.array(first.shape[0]),
            position=zero,
            purpose=jnp.array(STAR),
            elsewhere=exploration.empty(center, size) if self.explore else None,
            best=Best.unknown(center, self.feasible_within),
            blur=jnp.zeros_like(one),
            size=jnp.zeros(1 + limits.lower.size, x0.dtype),
            guard=jnp.zeros_like(one),
            spent=zero,
            turn=zero,
            iteration=zero,
            sides=sides,
            scale=scale,
            box=box,
            key=start.key,
            done=jnp.array(False),
            status=Status.running,
        )

    def _end(self, like: Array) -> Array:
        return jnp.asarray(self.tol, like.dtype)

    # -- ask and tell -----------------------------------------------------------------------------

    def ask(self, state: ModelState) -> Query:
        slots = state.queue.shape[0]
        index = state.position + jnp.arange(self.batch)
        wanted = index < state.count
        x = state.queue[jnp.minimum(index, slots - 1)] * state.scale[None]
        x = jnp.clip(x, state.box.lower[None], state.box.upper[None])
        query = batch_query(x, state.box, self.accuracy)
        return dataclasses.replace(query, mask=wanted)

    def tell(self, state: ModelState, query: Query, evaluation: Evaluation) -> ModelState:
        assert query.mask is not None
        value = energies(query, evaluation, state.best.value.dtype)
        rows = rows_of(evaluation, value)
        slots = state.queue.shape[0]
        index = state.position + jnp.arange(self.batch)
        points = state.queue[jnp.minimum(index, slots - 1)]
        index = jnp.where(query.mask, index, slots)
        violation = state.region.limits.violation(rows)
        best = state.best.among(points, value, violation)
        elsewhere, guard = state.elsewhere, state.guard
        if elsewhere is not None:
            violation = self._missed(violation)
            guard = self._guarded(state, value, violation)
            merit = value + jnp.where(violation > 0, guard * violation, 0)
            elsewhere = exploration.remembered(elsewhere, points, merit, query.mask)
        told = jnp.sum(query.mask)
        state = dataclasses.replace(
            state,
            values=state.values.at[index].set(value, mode="drop"),
            rows=state.rows.at[index].set(rows, mode="drop"),
            position=state.position + told,
            spent=state.spent + told,
            best=best,
            blur=largest_error(query, evaluation, state.blur),
            size=first_size(value, rows, state.size, state.spent == 0),
            elsewhere=elsewhere,
            guard=guard,
        )
        return when(state.position >= state.count, self._next, _same, state)

    def _missed(self, violation: Float[Array, "*k"]) -> Float[Array, "*k"]:
        return jnp.where(violation <= self.feasible_within, 0, violation)

    def _next(self, state: ModelState) -> ModelState:
        """What follows once all points that were asked for are told."""
        state = dataclasses.replace(state, iteration=state.iteration + 1)
        branches = [self._after_model, self._after_poll]
        if self.explore:
            branches.append(self._after_generation)
        return chosen(jnp.maximum(state.purpose - 1, 0), branches, state)

    def _asking(
        self, state: ModelState, points: Array, count: Any, purpose: int, members: Any = None
    ) -> ModelState:
        extra = state.queue.shape[0] - points.shape[0]
        order = state.members
        if members is not None:
            order = jnp.pad(members, (0, extra)).astype(order.dtype)
        return dataclasses.replace(
            state,
            queue=jnp.pad(points, ((0, extra), (0, 0))),
            values=jnp.full_like(state.values, jnp.inf),
            members=order,
            count=jnp.asarray(count, state.count.dtype),
            position=jnp.zeros_like(state.position),
            blur=jnp.zeros_like(state.blur),
            purpose=jnp.asarray(purpose, state.purpose.dtype),
        )

    # -- local search -----------------------------------------------------------------------------

    def _after_model(self, state: ModelState) -> ModelState:
        """The next step, a poll where the region has ended, or the turn of the other search."""
        old = state.region
        k = old.points.shape[0]
        region = when(
            state.purpose == STAR,
            lambda s: opened(old, s.queue[:k], s.values[:k], s.rows[:k], s.sides),
            lambda s: told(old, s.values[0], s.rows[0]),
            state,
        )
        region = planned(region, state.sides)
        nothing = ~jnp.isfinite(state.best.value)
        state = dataclasses.replace(
            state,
            region=region,
            done=nothing,
            status=Status.where(nothing, Status.all_failed, state.status),
        )
        if self.explore:
            over = region.done | (state.spent - state.turn >= LOCAL * (region.H.shape[0] + 1))
            return when(over, self._look_elsewhere, self._step, state)
        return when(region.done, self._poll, self._step, state)

    def _step(self, state: ModelState) -> ModelState:
        return self._asking(state, state.region.trial[None], 1, STEP)

    def _poll(self, state: ModelState) -> ModelState:
        """Random orthogonal directions around the best point of the model, at two lengths."""
        n = state.best.x.size
        key = jax.random.fold_in(state.key, state.iteration)
        directions = jnp.sqrt(state.region.end) * positive_basis(key, n, dtype=state.best.x.dtype)
        steps = jnp.concatenate([directions, NEARER * directions])
        points = jnp.clip(
            state.region.center[None] + steps, state.sides.low[None], state.sides.high[None]
        )
        return self._asking(state, points, 4 * n, POLL)

    def _after_poll(self, state: ModelState) -> ModelState:
        n = state.best.x.size
        points, values, rows = state.queue[: 4 * n], state.values[: 4 * n], state.rows[: 4 * n]
        region = self._fenced(state)
        radius, known = jnp.sqrt(region.end), jnp.isfinite(values)
        merits = jnp.where(known, region.merit(values, rows), jnp.inf)
        # The best point of all may have left the region before the penalty was right.
        left = jnp.any(state.best.x != region.center)
        known_best = jnp.where(left, state.best.merit(region.penalty), jnp.inf)
        candidates = jnp.concatenate([points, state.best.x[None]])
        merits = jnp.append(merits, known_best)
        lowest = jnp.argmin(merits)
        lower = merits[lowest] < region.merits[region.best]
        middle = jnp.append(region.values[region.best], region.rows[region.best])
        table = jnp.concatenate([values[:, None], rows], axis=1)
        far, near = (
            Bend.of(region.center, middle, points[of], table[of], length, state.size, state.blur)
            for of, length in ((slice(2 * n), radius), (slice(2 * n, 4 * n), NEARER * radius))
        )
        doubtful = ~jnp.all(known) | near.kinked(far)
        ended = Status.where(doubtful, Status.stalled, Status.converged_estimated)
        blurred = lost_in(region.center, NEARER * radius)
        ended = Status.where(blurred, Status.accuracy_floor, ended)
        ended = Status.where(~state.best.feasible, Status.infeasible, ended)
        again = dataclasses.replace(state, region=region)
        again = self._open_star(again, candidates[lowest], radius)
        over = dataclasses.replace(state, done=jnp.array(True), status=ended)
        return when(lower, lambda _: again, lambda _: over, None)

    def _fenced(self, state: ModelState) -> Region:
        """The region with a penalty by which no infeasible center is below a feasible point."""
        region = state.region
        violation = self._missed(region.limits.violation(region.rows[region.best]))
        outside = state.best.feasible & (violation > 0)
        gap = state.best.value - region.values[region.best]
        needed = jnp.where(outside, gap / jnp.where(outside, violation, 1), 0)
        penalty = jnp.where(region.penalty <= needed, 2 * needed, region.penalty)
        return dataclasses.replace(region, penalty=penalty)

    def _open_star(self, state: ModelState, center: Array, radius: Array) -> ModelState:
        """A new region around a point."""
        region = dataclasses.replace(state.region, radius=radius)
        points = star(center, radius, state.sides)
        # The value at the center is known, but asking again keeps one way in.
        state = dataclasses.replace(state, region=region)
        return self._asking(state, points, points.shape[0], STAR)

    # -- global search ----------------------------------------------------------------------------

    def _guarded(self, state: ModelState, values: Array, violation: Array) -> Array:
        """The penalty of the search elsewhere: no infeasible point of it may be lower than the best
        feasible one."""
        guard = jnp.maximum(state.guard, state.region.penalty)
        feasible = state.best.feasible & (state.purpose == GENERATION)
        outside = feasible & (violation > 0) & jnp.isfinite(violation)
        ratio = (state.best.value - values) / jnp.where(outside, violation, 1)
        needed = jnp.max(jnp.where(outside, ratio, 0), initial=0)
        return jnp.where(guard < needed, 2 * needed, guard)

    def _look_elsewhere(self, state: ModelState) -> ModelState:
        state = dataclasses.replace(state, turn=state.spent)
        assert state.elsewhere is not None
        elsewhere = exploration.centred(state.elsewhere, state.best.x)
        state = dataclasses.replace(state, elsewhere=elsewhere)
        return self._generation(state)

    def _generation(self, state: ModelState) -> ModelState:
        """A new sample, and whom of it to evaluate."""
        assert state.elsewhere is not None
        key = jax.random.fold_in(state.key, state.iteration)
        return self._want(state, exploration.drawn(state.elsewhere, key, state.sides))

    def _want(self, state: ModelState, elsewhere: Exploration) -> ModelState:
        points, members, count = exploration.wanted(elsewhere)
        state = dataclasses.replace(state, elsewhere=elsewhere)
        return self._asking(state, points, count, GENERATION, members)

    def _after_generation(self, state: ModelState) -> ModelState:
        this = state.elsewhere
        assert this is not None
        size = this.known.size
        violation = self._missed(state.region.limits.violation(state.rows[:size]))
        merits = state.values[:size] + jnp.where(violation > 0, state.guard * violation, 0)
        this, enough = exploration.answered(this, state.members[:size], merits, state.count)
        state = dataclasses.replace(state, elsewhere=this)
        return when(enough, self._after_evolution, lambda s: self._want(s, s.elsewhere), state)

    def _after_evolution(self, state: ModelState) -> ModelState:
        assert state.elsewhere is not None
        this = exploration.evolved(state.elsewhere)
        n = state.best.x.size
        collapsed = this.evolution.spread < exploration.COLLAPSED
        spread = this.evolution.spread
        key = jax.random.fold_in(state.key, state.iteration + 1_000_000_000)
        this = exploration.restarted(this, key, state.best.x, state.sides, collapsed)
        better = state.best.merit(state.region.penalty) < state.region.merits[state.region.best]
        time = collapsed | (state.spent - state.turn >= GLOBAL * (n + 1))
        resumes = ~better & ~state.region.done
        local = time & (better | resumes)
        state = dataclasses.replace(
            state, elsewhere=this, turn=jnp.where(time, state.spent, state.turn)
        )
        case = jnp.where(local, jnp.where(better, 2, 1), 0)
        reopened = jnp.clip(spread, jnp.sqrt(state.region.end), 1.0)
        return chosen(
            case,
            [self._generation, self._step, lambda s: self._open_star(s, s.best.x, reopened)],
            state,
        )

    # -- the end ----------------------------------------------------------------------------------

    def terminate(self, state: ModelState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: ModelState) -> dict[str, Array]:
        return {
            "iteration": state.iteration,
            "radius": state.region.radius,
            "floor": state.region.floor,
            "slope": state.region.slope,
        }


def _same(state: Any) -> Any:
    return state
