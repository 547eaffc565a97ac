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
from tolerax.solvers._branches import chosen, when
from tolerax.solvers._common import Box, lost_in
from tolerax.solvers._exploration import Exploration
from tolerax.solvers._model_steps import (
    Region,
    Sides,
    check_fields,
    first_radius,
    opened,
    planned,
    star,
    told,
)
from tolerax.solvers._population import batch_query, energies
from tolerax.status import Status

STAR, STEP, POLL, GENERATION = range(4)
# Multiples of n + 1 points after which local and global search take turns.
LOCAL, GLOBAL = 10, 30


class ModelState(eqx.Module):
    """The region, what is being asked of it, and what is known elsewhere.

    `queue` holds the points asked for, `energies` their values, `count` how many there are and
    `position` how many were told; `purpose` says what they are for.
    """

    region: Region
    queue: Float[Array, "q n"]
    energies: Float[Array, " q"]
    members: Int[Array, " q"]
    count: Int[Array, ""]
    position: Int[Array, ""]
    purpose: Int[Array, ""]
    elsewhere: Exploration | None
    best: Float[Array, ""]
    best_x: Float[Array, " n"]
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

    The run ends when the radius has reached `tol` and a poll of 2n random orthogonal directions
    around the best point, at the distance `sqrt(tol)`, found no lower value (with one, it goes on
    from there): `Status.converged_estimated`, or `Status.stalled` where some point of that poll
    failed, as at the edge of a region without values.

    - `radius`: the first radius, a number or a pytree like x, which is also the unit of each
      variable; by default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for
      variables without. - `tol`: the last radius, in units of the first.
    - `explore`: what to do with the budget that is left when the region has converged, or has spent
      25 (n + 1) points: look elsewhere by CMA-ES, of which a quadratic fitted to the last points
      ranks most of the sample, and take turns. Such a run ends with its budget.
    - `batch`: how many points may be asked for at once: those of the first model, of a poll, of a
      generation. It changes no iterate.
    - `accuracy`: what is asked of problems whose values are not exact.

    Points that fail count as being as high as the highest of the model.

    Source: Powell (NA2009/06, "The BOBYQA algorithm"; *Mathematical Programming* 100, 2004); Hansen
    (GECCO 2019) for `explore`.

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
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-6, 1e-6))

    def __check_init__(self):
        check_fields(self, "batch")

    @property
    def honours_bounds(self) -> bool:
        return True

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
        slots = max(first.shape[0], size if self.explore else 0)
        extra = slots - first.shape[0]
        infinite = jnp.full(slots, jnp.inf, x0.dtype)
        zero = jnp.array(0)
        region = opened(first, jnp.zeros(first.shape[0], x0.dtype), sides, one, self._end(one))
        return ModelState(
            region=region,
            queue=jnp.pad(first, ((0, extra), (0, 0))),
            energies=infinite,
            members=jnp.arange(slots),
            count=jnp.array(first.shape[0]),
            position=zero,
            purpose=jnp.array(STAR),
            elsewhere=exploration.empty(center, size) if self.explore else None,
            best=jnp.array(jnp.inf, x0.dtype),
            best_x=center,
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
        value = energies(query, evaluation, state.best.dtype)
        slots = state.queue.shape[0]
        index = state.position + jnp.arange(self.batch)
        points = state.queue[jnp.minimum(index, slots - 1)]
        index = jnp.where(query.mask, index, slots)
        lowest = jnp.argmin(value)
        lower = value[lowest] < state.best
        elsewhere = state.elsewhere
        if elsewhere is not None:
            elsewhere = exploration.remembered(elsewhere, points, value, query.mask)
        told = jnp.sum(query.mask)
        state = dataclasses.replace(
            state,
            energies=state.energies.at[index].set(value, mode="drop"),
            position=state.position + told,
            spent=state.spent + told,
            best=jnp.where(lower, value[lowest], state.best),
            best_x=jnp.where(lower, points[lowest], state.best_x),
            elsewhere=elsewhere,
        )
        return when(state.position >= state.count, self._next, _same, state)

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
            energies=jnp.full_like(state.energies, jnp.inf),
            members=order,
            count=jnp.asarray(count, state.count.dtype),
            position=jnp.zeros_like(state.position),
            purpose=jnp.asarray(purpose, state.purpose.dtype),
        )

    # -- local search -----------------------------------------------------------------------------

    def _after_model(self, state: ModelState) -> ModelState:
        """The next step, a poll where the region has ended, or the turn of the other search."""
        old = state.region
        k = old.points.shape[0]
        region = when(
            state.purpose == STAR,
            lambda s: opened(s.queue[:k], s.energies[:k], s.sides, old.radius, old.end),
            lambda s: told(s.region, s.energies[0]),
            state,
        )
        region = planned(region, state.sides)
        nothing = ~jnp.isfinite(state.best)
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
        """Random orthogonal directions around the best point."""
        n = state.best_x.size
        key = jax.random.fold_in(state.key, state.iteration)
        directions = positive_basis(key, n, dtype=state.best_x.dtype)
        points = state.best_x[None] + jnp.sqrt(state.region.end) * directions
        points = jnp.clip(points, state.sides.low[None], state.sides.high[None])
        # The value to beat comes with it.
        region = dataclasses.replace(state.region, promised=state.best)
        state = dataclasses.replace(state, region=region)
        return self._asking(state, points, 2 * n, POLL)

    def _after_poll(self, state: ModelState) -> ModelState:
        lower = state.best < state.region.promised
        n = state.best_x.size
        failed = jnp.any(~jnp.isfinite(state.energies[: 2 * n]))
        ended = Status.where(failed, Status.stalled, Status.converged_estimated)
        blurred = lost_in(state.best_x, jnp.sqrt(state.region.end))
        ended = Status.where(blurred, Status.accuracy_floor, ended)
        again = self._open_star(state, jnp.sqrt(state.region.end))
        over = dataclasses.replace(state, done=jnp.array(True), status=ended)
        return when(lower, lambda _: again, lambda _: over, None)

    def _open_star(self, state: ModelState, radius: Array) -> ModelState:
        """A new region around the best point."""
        region = dataclasses.replace(state.region, radius=radius)
        points = star(state.best_x, radius, state.sides)
        # The value at the center is known, but asking again keeps one way in.
        state = dataclasses.replace(state, region=region)
        return self._asking(state, points, points.shape[0], STAR)

    # -- global search ----------------------------------------------------------------------------

    def _look_elsewhere(self, state: ModelState) -> ModelState:
        state = dataclasses.replace(state, turn=state.spent)
        assert state.elsewhere is not None
        elsewhere = exploration.centred(state.elsewhere, state.best_x)
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
        this, enough = exploration.answered(
            this, state.members[:size], state.energies[:size], state.count
        )
        state = dataclasses.replace(state, elsewhere=this)
        return when(enough, self._after_evolution, lambda s: self._want(s, s.elsewhere), state)

    def _after_evolution(self, state: ModelState) -> ModelState:
        assert state.elsewhere is not None
        this = exploration.evolved(state.elsewhere)
        n = state.best_x.size
        collapsed = this.evolution.spread < exploration.COLLAPSED
        spread = this.evolution.spread
        key = jax.random.fold_in(state.key, state.iteration + 1_000_000_000)
        this = exploration.restarted(this, key, state.best_x, state.sides, collapsed)
        better = state.best < state.region.values[state.region.best]
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
            [self._generation, self._step, lambda s: self._open_star(s, reopened)],
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
