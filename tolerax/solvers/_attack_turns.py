"""The turns of attacks and of other solvers: whose is next, from where it goes on, and when a run
has seen enough."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from tolerax.contracts import Evaluation, Query, Solver, Start, State
from tolerax.inner.lbfgs import no_pairs
from tolerax.inner.particles import only_rows
from tolerax.solvers._attack_state import (
    GRADIENT,
    OTHER,
    RUNGS,
    SCATTER,
    AttackState,
    Turns,
)
from tolerax.solvers._common import select
from tolerax.solvers._population import flat
from tolerax.status import Status, is_success

ALIKE = 6  # attacks from random points that must end where the best point is
KEPT = 0.95  # of what was spent and won, at the end of every turn
FIRST = 3  # times as long is the first turn of attacks


def notable(
    gain: ArrayLike, feasible: Bool[Array, ""], before: Array, now: Array
) -> Float[Array, ""]:
    """A gain to go on for: a share of what was gained so far, or of a value that falls to 0;
    where nothing is feasible, of what is left of the violation."""
    size = jnp.abs(now)
    return jnp.asarray(gain) * jnp.where(feasible, jnp.minimum(before - now, size), size)


class Schedule(eqx.Module):
    """Who is asked when. The fields are those of `DirectionalAttack`."""

    then: tuple[Solver, ...]
    gain: ArrayLike
    burst: ArrayLike
    penalty: ArrayLike
    feasible_within: ArrayLike
    memory: int = eqx.field(static=True)

    # -- the other solvers ------------------------------------------------------------------------

    def first(self, x: Array) -> Turns:
        """The turn of the attack."""
        each, zero = jnp.zeros(1 + len(self.then), x.dtype), jnp.array(0)
        inf = jnp.array(jnp.inf, x.dtype)
        return Turns(
            number=zero,
            spent=each,
            wins=each,
            left=each + jnp.inf,
            own=each + jnp.inf,
            slow=each > 0,
            over=each > 0,
            here=zero,
            own_at=inf,
            at=inf,
            first=inf,
            verdict=Status.running,
            alike=zero,
            various=jnp.array(False),
            ends=jnp.array(False),
        )

    def unopened(self, start: Start) -> tuple[State, ...]:
        """States to be filled when the first turns begin; their code is compiled once, there."""

        def blank(leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jnp.broadcast_to(start.key, leaf.shape)
            return jnp.zeros(leaf.shape, leaf.dtype)

        keys = jax.random.split(start.key, len(self.then))
        return jax.tree.map(blank, eqx.filter_eval_shape(self._opened, start, keys))

    def _opened(self, start: Start, keys: Array) -> tuple[State, ...]:
        each = (start.x, start.bounds, start.carry)
        rest = (start.answer, start.constraint_bounds)
        return tuple(
            solver.init(Start(*each, key, *rest))
            for solver, key in zip(self.then, keys, strict=True)
        )

    def asked(self, state: AttackState) -> list[tuple[Array, Array]]:
        """The points that each of them asks for, and which of them are wanted."""
        return [
            _rows(solver.ask(other)) for solver, other in zip(self.then, state.others, strict=True)
        ]

    def told(
        self, i: int, state: AttackState, query: Query, evaluation: Evaluation, energy: Array
    ) -> AttackState:
        """Tell one of them; its turn ends with it, or when it has had its points."""
        solver, other = self.then[i], state.others[i]
        own = solver.ask(other)
        rows = slice(1, 1 + _rows(own)[1].shape[0])
        cut = lambda leaf: leaf[rows]  # noqa: E731
        assert query.mask is not None
        asked = dataclasses.replace(own, mask=query.mask[rows])
        bare = dataclasses.replace(evaluation, gradient=None)
        answer = eqx.tree_at(
            lambda e: e.work,
            jax.tree.map(cut, only_rows(bare)),
            evaluation.work,
            is_leaf=lambda leaf: leaf is None,
        )
        if not solver.honours_constraints:
            answer = dataclasses.replace(
                answer,
                value=energy[rows],
                value_error=jnp.zeros_like(energy[rows]),
                violation=None,
                constraints=None,
            )
        other = solver.tell(other, asked, answer)
        done, status = solver.terminate(other)
        if evaluation.violation is not None and not solver.honours_constraints:
            # What it has converged to is a kinked sum of value and penalty.
            status = Status.where(is_success(status), Status.stalled, status)
        turns = state.turns
        turns = dataclasses.replace(
            turns,
            over=turns.over.at[1 + i].set(done),
            verdict=Status.where(done, status, turns.verdict),
            ends=done | self.long(state),
        )
        others = (*state.others[:i], other, *state.others[i + 1 :])
        return dataclasses.replace(state, others=others, turns=turns)

    def long(self, state: AttackState) -> Bool[Array, ""]:
        """Whether a turn has had its points."""
        turns = state.turns
        first = (turns.number == 0) & jnp.isinf(turns.left[0])
        return turns.here >= jnp.where(first, FIRST, 1) * self.burst * (state.x.size + 1)

    # -- what was found ---------------------------------------------------------------------------

    def credited(
        self, state: AttackState, points: Array, value: Array, violation: Array, count: Array
    ) -> AttackState:
        """With an answer, whoever asked; points without a value have an infinite one."""
        turns, energy = state.turns, value + state.penalty * violation
        best = state.best.among(points, value, violation)
        began = jnp.isinf(turns.first) & best.feasible
        turns = dataclasses.replace(
            turns,
            # A violation cannot be compared with a value.
            left=jnp.where(began, jnp.inf, turns.left),
            at=jnp.where(began, jnp.inf, turns.at),
            first=jnp.where(began, best.value, turns.first),
            own=turns.own.at[turns.number].min(jnp.min(energy)),
            here=turns.here + count,
            spent=turns.spent.at[turns.number].add(count.astype(turns.spent.dtype)),
        )
        return dataclasses.replace(state, best=best, turns=turns, iteration=state.iteration + 1)

    def near(self, state: AttackState) -> Float[Array, ""]:
        """A difference within which two attacks have ended at the same height."""
        return 1e-4 * self._fall(state) + 1e-6 * jnp.abs(state.best.height)

    def _tiny(self, state: AttackState) -> Float[Array, ""]:
        """A difference that says nothing."""
        return 1e-9 * self._fall(state) + 1e-6 * jnp.abs(state.best.height)

    def _much(self, state: AttackState) -> Float[Array, ""]:
        """A difference that makes a win."""
        best = state.best
        large = notable(self.gain, best.feasible, state.turns.first, best.height)
        return jnp.maximum(large, 1e-9 * self._fall(state))

    def _energy(self, state: AttackState) -> Float[Array, ""]:
        """What attacks would lower at the best point."""
        return state.best.merit(state.penalty)

    def _fall(self, state: AttackState) -> Array:
        """What was gained so far."""
        return jnp.where(state.best.feasible, state.turns.first - state.best.value, 0)

    def _lower(self, state: AttackState, before: Array, than: Array) -> Array:
        """Whether the best point has come down from `before` by more `than`; from an infinite
        height it has with any value."""
        now = state.best.height
        return (jnp.isinf(before) & (now < jnp.inf)) | (before - now > than)

    # -- whose turn is next -----------------------------------------------------------------------

    def following(self, state: AttackState) -> AttackState:
        """The turn of the one that has spent least for what it finds; or the end."""
        state = self._judged(state)
        turns = state.turns
        moved = self._lower(state, turns.left, self._tiny(state))
        ended = turns.over & ~moved
        state = self._believed(state, ended)
        # There is always another point to attack.
        idle = ended.at[0].set(False)
        # As much for the last one as for all others, which look near the best point only.
        weight = jnp.ones_like(turns.spent).at[-1].set(len(self.then)) * (1 + turns.wins) ** 2
        number = jnp.argmin(jnp.where(idle, jnp.inf, turns.spent / weight))
        # What may be the minimum is put to the test.
        asks = jnp.any(ended[1:]) & _bounded(state) & ~turns.various & (turns.alike < ALIKE)
        number = jnp.where(asks, 0, number)
        behind = turns.own - self._energy(state) > self._much(state)
        # Attacks from random points are behind until they end.
        stale = turns.slow & behind & ~((jnp.arange(behind.size) == 0) & state.random)
        fresh = (turns.over | jnp.isinf(turns.left) | stale)[number]
        own = jnp.where(fresh, jnp.inf, turns.own[number])
        turns = dataclasses.replace(
            turns,
            number=number,
            over=turns.over.at[number].set(False),
            own=turns.own.at[number].set(own),
            own_at=own,
        )
        state = dataclasses.replace(state, turns=turns)
        again = select(moved[0], self._here(state), _anywhere(state))
        attack = select(fresh, again, dataclasses.replace(state, mode=state.next))
        other = dataclasses.replace(state, mode=jnp.array(OTHER))
        return self._begun(select(number == 0, attack, other), fresh)

    def _judged(self, state: AttackState) -> AttackState:
        """With what the turn has found: whether the best point is lower, whether its own solver has
        come nearer to it by half, and, of an attack from a random point, whether it ended there."""
        turns, top = state.turns, self._energy(state)
        i, near = turns.number, self.near(state)
        won = self._lower(state, turns.at, self._much(state))
        halved = turns.own[i] - top <= 0.5 * (turns.own_at - top)
        lower = self._lower(state, turns.at, near)
        end = state.random & (i == 0) & turns.over[0]
        # Where nothing has a value all ends are the same.
        same = (jnp.abs(state.energy - top) <= near) | jnp.isinf(top)
        turns = dataclasses.replace(
            turns,
            spent=KEPT * turns.spent,
            wins=KEPT * turns.wins.at[i].add(won),
            slow=turns.slow.at[i].set(~halved),
            left=turns.left.at[i].set(state.best.height),
            at=state.best.height,
            here=jnp.zeros_like(turns.here),
            alike=jnp.where(lower, 0, turns.alike + (end & same)),
            various=turns.various | (end & (lower | ~same)),
            ends=jnp.array(False),
        )
        return dataclasses.replace(state, turns=turns)

    def _believed(self, state: AttackState, ended: Array) -> AttackState:
        """Whether the run is over: a solver has ended at the best point, no other one has spent
        less, and attacks from random points have all ended there too. Without bounds no points are
        random enough to say so, but only a success is believed."""
        turns = state.turns
        most = jnp.max(jnp.where(ended[1:], turns.spent[1:], -jnp.inf))
        enough = jnp.all(ended[1:] | (turns.spent[1:] >= most)) & (most > -jnp.inf)
        agreed = (turns.alike >= ALIKE) & ~turns.various
        alone = is_success(turns.verdict) | jnp.isinf(state.best.height)
        done = enough & jnp.where(_bounded(state), agreed, alone)
        status = Status.where(done, self._named(state), state.status)
        return dataclasses.replace(state, done=done, status=status)

    def _begun(self, state: AttackState, fresh: Bool[Array, ""]) -> AttackState:
        """The next solver begins at the best point, unless it goes on."""
        x = state.box.unravel(state.box.clip(state.unit * state.best.x))
        bounds = (state.box.unravel(state.box.lower), state.box.unravel(state.box.upper))
        keys = jax.random.split(jax.random.fold_in(state.key, state.iteration), len(self.then))
        opened = self._opened(Start(x, bounds, None, keys[0], _nothing, state.limits), keys)
        others = tuple(
            select(fresh & (state.turns.number == i), new, old)
            for i, (new, old) in enumerate(zip(opened, state.others, strict=True), 1)
        )
        return dataclasses.replace(state, others=others)

    def ended(self, state: AttackState) -> AttackState:
        """Where attacks are all there is."""
        found = jnp.isfinite(state.best.height)
        verdict = Status.where(found, Status.stalled, Status.all_failed)
        turns = dataclasses.replace(state.turns, verdict=verdict)
        state = dataclasses.replace(state, turns=turns, done=jnp.array(True))
        return dataclasses.replace(state, status=self._named(state))

    def _named(self, state: AttackState) -> Any:
        """The verdict, or that nothing feasible was found."""
        known = state.best.feasible | ~jnp.isfinite(state.best.height)
        return Status.where(known, state.turns.verdict, Status.infeasible)

    # -- where attacks begin ----------------------------------------------------------------------

    def _here(self, state: AttackState) -> AttackState:
        """At the best point."""
        state = dataclasses.replace(state, x=state.best.x, random=jnp.array(False))
        return self._afresh(state, self._energy(state))

    def scattered(self, state: AttackState) -> Float[Array, "rungs n"]:
        """Random points within the bounds, or near the best one where one of them is missing."""
        key = jax.random.fold_in(state.key, state.iteration)
        (low, high), x = state.sides, state.best.x
        both = jnp.isfinite(low) & jnp.isfinite(high)
        low = jnp.where(both, low, jnp.maximum(low, x - 4))
        high = jnp.where(both, high, jnp.minimum(high, x + 4))
        shares = jax.random.uniform(key, (RUNGS, state.x.size), state.x.dtype)
        return low[None] + shares * (high - low)[None]

    def elsewhere(
        self, state: AttackState, points: Array, energy: Array, violation: Array
    ) -> AttackState:
        """At the scattered point that violates least, and has the lowest value of those."""
        scattered = slice(1, 1 + RUNGS)
        points, energy, violation = points[scattered], energy[scattered], violation[scattered]
        violation = jnp.where(jnp.isfinite(energy), violation, jnp.inf)
        least = violation <= jnp.maximum(jnp.min(violation), self.feasible_within)
        best = jnp.argmin(jnp.where(least, energy, jnp.inf))
        penalty = jnp.asarray(self.penalty, state.penalty.dtype)
        less = jnp.where(violation[best] > 0, (state.penalty - penalty) * violation[best], 0)
        state = dataclasses.replace(
            state,
            x=points[best],
            penalty=penalty,
            lengths=jnp.ones_like(state.lengths),
            random=jnp.array(True),
        )
        return self._afresh(state, energy[best] - less)

    def _afresh(self, state: AttackState, energy: Array) -> AttackState:
        """An attack that knows nothing but its point."""
        nothing = jnp.zeros_like(state.x)
        return dataclasses.replace(
            state,
            energy=energy,
            mode=jnp.array(GRADIENT),
            next=jnp.array(GRADIENT),
            pairs=no_pairs(self.memory, state.x),
            before=(state.x, nothing),
            held=jax.tree.map(jnp.zeros_like, state.held),
            violation=jnp.full_like(state.violation, jnp.inf),
            momentum=nothing,
            lengths=jnp.maximum(state.lengths, 1e-3),
            back=jnp.ones_like(state.back),
            since=energy,
            gains=jnp.full_like(state.gains, jnp.inf),
        )


def _bounded(state: AttackState) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(state.box.lower) & jnp.isfinite(state.box.upper))


def _anywhere(state: AttackState) -> AttackState:
    """At random points, of which one will be attacked."""
    return dataclasses.replace(state, mode=jnp.array(SCATTER))


def _nothing(query: Query) -> PyTree:
    raise ValueError("a solver of `then` must not ask for the shapes of answers.")


def _rows(query: Query) -> tuple[Array, Array]:
    """The points of a batch as rows, and which of them are wanted."""
    if query.mask is None or query.derivatives:
        raise ValueError("the solvers of `then` must ask for values at batches of points.")
    return flat(query.x), query.mask
