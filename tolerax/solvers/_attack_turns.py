"""The turns of other solvers between attacks, and points to begin anew from."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from tolerax.contracts import Evaluation, Query, Solver, Start, State
from tolerax.inner.lbfgs import no_pairs
from tolerax.inner.particles import only_rows
from tolerax.solvers._attack_state import OTHER, RUNGS, SCATTER, AttackState
from tolerax.solvers._common import select
from tolerax.solvers._population import flat
from tolerax.status import Status, is_success


def notable(gain: ArrayLike, state: AttackState, before: Array, now: Array) -> Array:
    """A gain to go on for: a share of what was gained so far, or of a value that falls to 0;
    where nothing is feasible, of what is left of the violation."""
    size = jnp.abs(now)
    return jnp.asarray(gain) * jnp.where(state.feasible, jnp.minimum(before - now, size), size)


class Turns(eqx.Module):
    """The solvers of `then`, told to begin where attacks stall. The other fields are those of
    `DirectionalAttack`."""

    then: tuple[Solver, ...]
    gain: ArrayLike
    burst: ArrayLike
    restarts: ArrayLike
    penalty: ArrayLike
    feasible_within: ArrayLike
    memory: int = eqx.field(static=True)

    def first_burst(self, x: Array) -> Array:
        """Points of the first turn."""
        kind = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
        return jnp.asarray(self.burst * (x.size + 1)).astype(kind)

    def opened(self, start: Start, keys: Array) -> tuple[State, ...]:
        """Their states at the start."""
        return tuple(
            solver.init(_start(start, key)) for solver, key in zip(self.then, keys, strict=True)
        )

    def asked(self, state: AttackState) -> list[tuple[Array, Array]]:
        """The points that each of them asks for, and which of them are wanted."""
        return [
            _rows(solver.ask(other)) for solver, other in zip(self.then, state.others, strict=True)
        ]

    def taken(self, state: AttackState) -> AttackState:
        """They begin at the best point; without any the run ends."""
        if not self.then:
            found = jnp.isfinite(state.energy)
            status = Status.where(found, Status.stalled, Status.all_failed)
            return dataclasses.replace(state, done=jnp.array(True), status=_named(state, status))
        return dataclasses.replace(
            state,
            begins=jnp.array(True),
            over=jnp.zeros_like(state.over),
            mode=jnp.array(OTHER),
            spent=jnp.zeros_like(state.spent),
            at_turn=state.energy,
        )

    def begun(self, state: AttackState) -> AttackState:
        """With their new states."""
        x = state.box.unravel(state.box.clip(state.unit * state.x))
        bounds = (state.box.unravel(state.box.lower), state.box.unravel(state.box.upper))
        keys = jax.random.split(jax.random.fold_in(state.key, state.iteration), len(self.then))
        start = Start(x, bounds, None, keys[0], _nothing, state.limits)
        others = self.opened(start, keys)
        return dataclasses.replace(state, others=others, begins=jnp.array(False))

    def told(
        self,
        i: int,
        state: AttackState,
        query: Query,
        evaluation: Evaluation,
        points: Array,
        energy: Array,
    ) -> tuple[AttackState, Array]:
        """Tell one of them, and see whose turn is next: also whether attacks go on."""
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
        best = jnp.argmin(energy)
        lower = energy[best] < state.energy
        spent = state.spent + jnp.sum(query.mask).astype(state.spent.dtype)
        over = state.over.at[i].set(done)
        others = (*state.others[:i], other, *state.others[i + 1 :])
        state = dataclasses.replace(
            state,
            x=jnp.where(lower, points[best], state.x),
            energy=jnp.where(lower, energy[best], state.energy),
            others=others,
            over=over,
            spent=spent,
        )
        ended = done | (spent >= state.burst)
        after, again = self._after(i, state, status)
        return select(ended, after, state), ended & again

    def _after(self, i: int, state: AttackState, status: Any) -> tuple[AttackState, Array]:
        """Attacks again where the others have moved on; else the next one's turn, for longer after
        a round of them."""
        gained = state.at_turn - state.energy
        large = gained > notable(self.gain, state, state.began, state.at_turn)
        count = len(state.others)
        last = i == count - 1
        burst = jnp.where(large, state.burst, (2 if last else 1) * state.burst)
        state = dataclasses.replace(state, burst=burst)
        following = jnp.array((i + 1) % count)
        if count > 1:
            order = (i + 1 + jnp.arange(count)) % count
            following = order[jnp.argmin(state.over[order])]
        waiting = dataclasses.replace(
            state,
            turn=following,
            spent=jnp.zeros_like(state.spent),
            done=jnp.all(state.over),
            status=Status.where(jnp.all(state.over), _named(state, status), state.status),
        )
        # Where turns find nothing to hold on to, elsewhere there may be something.
        lost = jnp.all(state.over) & ~is_success(status) | (jnp.array(last) & ~state.feasible)
        elsewhere = lost & (state.restarted < self.restarts)
        waiting = select(elsewhere, self._scattered(state), waiting)
        # After a round a small gain is reason enough for an attack, which costs little.
        least = 1e-6 * jnp.abs(state.at_turn)
        again = large | (last & state.feasible & (gained > least))
        return select(again, self.afresh(state), waiting), again

    def afresh(self, state: AttackState) -> AttackState:
        """An attack that knows nothing but its point."""
        nothing = jnp.zeros_like(state.x)
        return dataclasses.replace(
            state,
            turn=jnp.zeros_like(state.turn),
            pairs=no_pairs(self.memory, state.x),
            before=(state.x, nothing),
            held=jax.tree.map(jnp.zeros_like, state.held),
            violation=jnp.full_like(state.violation, jnp.inf),
            momentum=nothing,
            lengths=jnp.maximum(state.lengths, 1e-3),
            back=jnp.ones_like(state.back),
            since=state.energy,
            gains=jnp.full_like(state.gains, jnp.inf),
        )

    def _scattered(self, state: AttackState) -> AttackState:
        """Random points within the bounds, or near x where there are none."""
        key = jax.random.fold_in(state.key, state.iteration)
        low, high = state.box.lower / state.unit, state.box.upper / state.unit
        low = jnp.where(jnp.isfinite(low), low, jnp.minimum(state.x, high) - 4)
        high = jnp.where(jnp.isfinite(high), high, jnp.maximum(state.x, low) + 4)
        shares = jax.random.uniform(key, (RUNGS, state.x.size), state.x.dtype)
        return dataclasses.replace(
            state,
            rungs=state.filled(low[None] + shares * (high - low)[None]),
            mode=jnp.array(SCATTER),
            restarted=state.restarted + 1,
            burst=self.first_burst(state.x),
        )

    def elsewhere(
        self, state: AttackState, points: Array, energy: Array, violation: Array
    ) -> AttackState:
        """An attack of the scattered point that violates least, and has the lowest value of
        those."""
        scattered = slice(1, 1 + RUNGS)
        points, energy, violation = points[scattered], energy[scattered], violation[scattered]
        violation = jnp.where(jnp.isfinite(energy), violation, jnp.inf)
        least = violation <= jnp.maximum(jnp.min(violation), self.feasible_within)
        best = jnp.argmin(jnp.where(least, energy, jnp.inf))
        penalty = jnp.asarray(self.penalty, state.penalty.dtype)
        less = jnp.where(violation[best] > 0, (state.penalty - penalty) * violation[best], 0)
        here = energy[best] - less
        state = dataclasses.replace(
            state,
            x=points[best],
            energy=here,
            began=here,
            penalty=penalty,
            lengths=jnp.ones_like(state.lengths),
        )
        return self.afresh(state)


def _named(state: AttackState, status: Any) -> Any:
    """The status, or that nothing feasible was found."""
    known = state.feasible | ~jnp.isfinite(state.energy)
    return Status.where(known, status, Status.infeasible)


def _start(start: Start, key: PRNGKeyArray) -> Start:
    """The same with another key."""
    return Start(start.x, start.bounds, start.carry, key, start.answer, start.constraint_bounds)


def _nothing(query: Query) -> PyTree:
    raise ValueError("a solver of `then` must not ask for the shapes of answers.")


def _rows(query: Query) -> tuple[Array, Array]:
    """The points of a batch as rows, and which of them are wanted."""
    if query.mask is None or query.derivatives:
        raise ValueError("the solvers of `then` must ask for values at batches of points.")
    return flat(query.x), query.mask
