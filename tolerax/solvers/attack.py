"""Directional attacks: steps along the gradient through a network, at many lengths at once, and
direct search where they find nothing."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.lbfgs import add_pair, no_pairs
from tolerax.inner.particles import only_rows
from tolerax.inner.positive_bases import positive_basis
from tolerax.solvers._attack_state import AttackState
from tolerax.solvers._attack_steps import (
    KEPT,
    directions,
    estimated,
    none_held,
    penalty_for,
    remembered,
    tangents,
    weighted,
    with_earlier,
)
from tolerax.solvers._branches import when
from tolerax.solvers._common import Box, select
from tolerax.solvers._population import check_positive, flat
from tolerax.solvers.cdsm import CDSM
from tolerax.solvers.model_trust_region import ModelTrustRegion, first_radius
from tolerax.status import Status, is_failed, is_success

GRADIENT, LADDER, SCATTER, OTHER = range(4)
KINDS = 4  # sign, gradient, momentum, quasi-Newton
FACTORS = (4.0, 1.0, 0.25, 0.0625)  # of the length that was best before
SMALLEST = 1e-10  # length, in units, below which attacks find nothing


class DirectionalAttack(Solver):
    """Attacks along the gradient through a network, then solvers that need none.

    An attack asks for the gradient at the best point, and then for the values along four
    directions from it (the signs of the gradient, the gradient, a momentum of it, and an L-BFGS
    direction), each at four lengths, in one batch; the lowest is the next point. Signs and gradient
    are taken in the unit of each variable, and the lengths follow what succeeded. Where there are
    constraints, the directions are those of the Lagrangian, within the tangents of the tightest
    constraints here and at the last points, and each rung also steps back to these tangents.

    Where attacks stall (the last three together lower the value by less than `gain` of what they
    have lowered it by so far, or of the value; or the gradient is zero, as in the flat parts of a
    network) the solvers of `then` take turns, from the best point on. As soon as one has lowered
    the value by as much, or all of them by anything at all, attacks begin again there. Turns that
    find little grow twice as long, so that most of a long run is theirs. Where they end without
    success, or as long as no point was feasible, the run begins anew from one of 16 random points
    within the bounds: the lowest of those that violate least.

    All of this is heuristic: since the solvers of `then` begin anew after each success, a run
    inherits none of their guarantees.

    - `then`: a tuple of solvers that ask for values at batches of points; by default a
      [`ModelTrustRegion`][] with this `tol`, and [`CDSM`][] too where there are constraints, along
      whose edges models of a penalty jam. With an empty one a run ends where attacks stall.
    - `radius`: the unit of each variable, and the first length: a number or a pytree like x; by
      default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for variables without.
    - `gain`: see above. - `burst`: points of the first turn, in multiples of n + 1.
    - `restarts`: how often a run begins anew, at most.
    - `samples`: for problems that give no derivatives: estimate the gradient by central differences
      along so many random orthogonal directions instead, at the length that succeeded last.
    - `memory`: L-BFGS pairs.
    - `penalty`: weight of the `violation` of a point; grows by half whenever the attacked point
      violates more than `feasible_within`.
    - `accuracy`: what is asked of problems whose values are not exact.

    Source: the signs are those of the attack of Goodfellow, Shlens, Szegedy (ICLR 2015); a hybrid
    of it and direct search is due to Bouchet, Vidal (arXiv 2510.01461). Ladder, quasi-Newton
    direction, tangents and turns are our own.

    >>> import jax.numpy as jnp, tolerax
    >>> network = lambda x: jnp.tanh(x - jnp.array([0.3, -0.4]))
    >>> problem = tolerax.NeuralSurrogate(network, lambda z, x: jnp.sum(z**2), trust=(-1.0, 1.0))
    >>> solution = tolerax.solve(problem, tolerax.DirectionalAttack(), jnp.ones(2))
    >>> solution.x.round(4)
    Array([ 0.3, -0.4], dtype=float64)
    """

    then: tuple[Solver, ...] | None = None
    radius: PyTree = None
    tol: float = 1e-6
    gain: float = 1e-2
    burst: float = 10.0
    restarts: int = 20
    samples: int = eqx.field(static=True, default=0)
    memory: int = eqx.field(static=True, default=10)
    penalty: float = 1.0
    feasible_within: float = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-6, 1e-6))

    def __check_init__(self):
        check_positive(self, "gain", "burst", "penalty", "feasible_within", "tol")
        for name in ("samples", "restarts", "memory"):
            if getattr(self, name) < (name == "memory"):
                raise ValueError(f"{name} is {getattr(self, name)}: give a larger integer.")

    def _others(self, limits: tuple[PyTree, PyTree] | None) -> tuple[Solver, ...]:
        if self.then is not None:
            return self.then
        # Their fields are set afterwards, since they may be traced.
        models = eqx.tree_at(lambda s: s.tol, ModelTrustRegion(batch=16), self.tol)
        if limits is None:
            return (models,)
        fields = (self.tol, self.feasible_within)
        return models, eqx.tree_at(lambda s: (s.tol, s.feasible_within), CDSM(), fields)

    @property
    def honours_bounds(self) -> bool:
        return True

    @property
    def honours_constraints(self) -> bool:
        return True

    @property
    def feasibility(self) -> ArrayLike:
        return self.feasible_within

    # -- the start --------------------------------------------------------------------------------

    def init(self, start: Start) -> AttackState:
        x0, _ = ravel_pytree(start.x)
        n, dtype = x0.size, x0.dtype
        box = Box.of(start)
        unit = first_radius(self.radius, start, box)
        inf, count = jnp.array(jnp.inf, dtype), jnp.array(0)
        then = self._others(start.constraint_bounds)
        keys = jax.random.split(start.key, len(then) + 1)
        u = x0 / unit
        state = AttackState(
            x=u,
            energy=inf,
            violation=inf,
            normal=jnp.zeros_like(u),
            back=jnp.ones((), dtype),
            kinds=jnp.zeros((KINDS, n), dtype),
            before=(u, jnp.zeros_like(u)),
            held=none_held(u, start.constraint_bounds is not None),
            momentum=jnp.zeros_like(u),
            pairs=no_pairs(self.memory, u),
            lengths=jnp.ones(KINDS, dtype),
            rungs=jnp.broadcast_to(u, (self._rungs(), n)),
            mode=jnp.array(GRADIENT),
            began=inf,
            since=inf,
            gains=jnp.full(3, jnp.inf, dtype),
            others=tuple(
                solver.init(_start(start, start.x, key))
                for solver, key in zip(then, keys[1:], strict=True)
            ),
            begins=jnp.array(False),
            turn=count,
            spent=count,
            burst=self._first_burst(u),
            over=jnp.zeros(len(then), bool),
            feasible=jnp.array(False),
            restarted=count,
            at_turn=inf,
            penalty=jnp.asarray(self.penalty, dtype),
            iteration=count,
            attacks=count,
            unit=unit,
            box=box,
            limits=start.constraint_bounds,
            key=keys[0],
            done=jnp.array(False),
            status=Status.running,
        )
        return self._look(state, jnp.array(True))

    def _first_burst(self, x: Array) -> Array:
        kind = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
        return jnp.asarray(self.burst * (x.size + 1)).astype(kind)

    def _rungs(self) -> int:
        return max(KINDS * len(FACTORS), 2 * self.samples)

    # -- ask --------------------------------------------------------------------------------------

    def ask(self, state: AttackState) -> Query:
        x = state.box.clip(state.unit * state.x)
        asked = [self._attack(state)]
        asked += [
            _rows(solver.ask(other))
            for solver, other in zip(self._others(state.limits), state.others, strict=True)
        ]
        width = max(mask.shape[0] for _, mask in asked)
        which = jnp.where(state.mode == OTHER, 1 + state.turn, 0)
        padded = [_padded(points, mask, width) for points, mask in asked]
        points, mask = jax.tree.map(lambda *rows: jnp.stack(rows)[which], *padded)
        points = jnp.concatenate([x[None], points])
        mask = jnp.concatenate([(state.mode == GRADIENT)[None], mask])
        each = lambda t: jnp.broadcast_to(jnp.asarray(t, x.dtype), mask.shape)  # noqa: E731
        return Query(
            jax.vmap(state.box.unravel)(points),
            Accuracy(each(self.accuracy.state), each(self.accuracy.adjoint)),
            mask=mask,
            derivatives=0 if self.samples else 1,
            first_only=not self.samples,
        )

    def _attack(self, state: AttackState) -> tuple[Array, Array]:
        """The rungs of the ladder, or the samples for a gradient."""
        points = jnp.clip(
            state.unit[None] * state.rungs, state.box.lower[None], state.box.upper[None]
        )
        count = jnp.where(state.mode == GRADIENT, 2 * self.samples, KINDS * len(FACTORS))
        return points, jnp.arange(self._rungs()) < count

    # -- tell -------------------------------------------------------------------------------------

    def tell(self, state: AttackState, query: Query, evaluation: Evaluation) -> AttackState:
        assert query.mask is not None
        dtype = state.x.dtype
        value = (evaluation.value + evaluation.value_error).astype(dtype)
        ok = query.mask & ~is_failed(evaluation.status) & (value < jnp.inf)
        violation = jnp.zeros_like(value)
        if evaluation.violation is not None:
            violation = jnp.where(ok, evaluation.violation.astype(dtype), 0)
        energy = jnp.where(ok, value + state.penalty * violation, jnp.inf)
        points = flat(query.x) / state.unit[None]
        state = dataclasses.replace(
            state,
            iteration=state.iteration + 1,
            feasible=state.feasible | jnp.any(ok & (violation <= self.feasible_within)),
        )
        told = (points, energy, violation)
        branches = [
            lambda: self._tell_gradient(state, evaluation, *told),
            lambda: self._tell_ladder(state, *told),
            lambda: self._tell_scatter(state, *told),
        ]
        branches += [
            lambda i=i: self._tell_other(i, state, query, evaluation, *told)
            for i in range(len(state.others))
        ]
        which = jnp.where(state.mode == OTHER, OTHER + state.turn, state.mode)
        state = jax.lax.switch(which, branches)
        if not state.others:
            return state
        # In one place for all branches: the code of other solvers is long to compile.
        return when(state.begins, self._begun, lambda state: state, state)

    def _tell_gradient(
        self,
        state: AttackState,
        evaluation: Evaluation,
        points: Array,
        energy: Array,
        violation: Array,
    ) -> AttackState:
        """Directions, and a ladder along them; or the turn of the others."""
        if self.samples:
            here = jnp.where(jnp.isfinite(state.energy), state.energy, energy[0])
            g = estimated(state.rungs[: 2 * self.samples], energy[1:])
        else:
            here = energy[0]
            g, _ = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], evaluation.gradient))
            g = state.unit * g.astype(state.x.dtype)
        tight, earlier = None, g
        if state.limits is not None and evaluation.jacobian is not None:
            held = state.held
            tight = tangents(evaluation, state.limits, state.unit, state.x)
            tight = with_earlier(tight, held, evaluation, state.limits)
            earlier = g + weighted(evaluation, held.places, held.weights, state.unit) + held.rest
        old_x, old_g = state.before
        pairs = add_pair(state.pairs, state.x - old_x, earlier - old_g)
        known = jnp.any(old_g != 0) & jnp.all(jnp.isfinite(earlier))
        state = dataclasses.replace(state, pairs=select(known, pairs, state.pairs))
        length = jnp.clip(state.lengths[1], 1e-3, 1.0)
        found = directions(g, tight, state.pairs, state.momentum, length, state.blocked)
        more = jnp.zeros_like(here)
        if tight is not None:
            state = dataclasses.replace(
                state, held=remembered(state.held, tight, found.multipliers)
            )
            weight = penalty_for(
                found.needed,
                state.penalty,
                self.penalty,
                violation[0],
                state.violation,
                self.feasible_within,
            )
            more = weight - state.penalty
        good = jnp.all(jnp.isfinite(found.slope)) & jnp.any(found.slope != 0)
        usable = jnp.isfinite(here) & good
        now = here + more * violation[0]
        arrived = (violation[0] <= self.feasible_within) & (state.violation > self.feasible_within)
        since = lambda old: jnp.where(  # noqa: E731
            jnp.isfinite(old) & ~arrived, old + more * violation[0], now
        )
        state = dataclasses.replace(
            state,
            energy=now,
            violation=violation[0],
            penalty=state.penalty + more,
            normal=found.normal,
            kinds=found.along,
            before=(state.x, found.total),
            momentum=jnp.where(usable, 0.9 * state.momentum + found.slope, state.momentum),
            # In the new penalty, or every gain would look large beside what was gained before; and
            # what was gained on the way to a feasible point says nothing of gains beyond.
            began=since(state.began),
            since=since(state.since),
            mode=jnp.array(LADDER),
        )
        state = dataclasses.replace(state, rungs=self._ladder(state))
        return select(usable, state, self._others_turn(state))

    def _ladder(self, state: AttackState) -> Array:
        factors = jnp.asarray(FACTORS, state.x.dtype)
        steps = factors[:, None, None] * (state.lengths[:, None] * state.kinds)[None]
        back = jnp.minimum(4 * factors, 1)[:, None, None] * state.back * state.normal[None, None]
        rungs = state.x[None] + (back - steps).reshape(-1, state.x.size)
        return self._filled(state, rungs)

    def _filled(self, state: AttackState, rungs: Array) -> Array:
        """As many rows as any attack asks for."""
        more = state.rungs.shape[0] - rungs.shape[0]
        return jnp.pad(rungs, ((0, more), (0, 0)), mode="edge")

    def _tell_ladder(
        self, state: AttackState, points: Array, energy: Array, violation: Array
    ) -> AttackState:
        """The lowest rung, if it is lower; where that is not enough, the turn of the others."""
        del violation
        count = KINDS * len(FACTORS)
        points, energy = points[1 : 1 + count], energy[1 : 1 + count]
        best = jnp.argmin(energy)
        lower = energy[best] < state.energy
        by_kind = jnp.min(energy.reshape(len(FACTORS), KINDS), axis=0) < state.energy
        at = jnp.argmin(energy.reshape(len(FACTORS), KINDS), axis=0)
        # A kind that found nothing tries shorter ones next time.
        lengths = state.lengths * jnp.where(by_kind, jnp.asarray(FACTORS)[at], FACTORS[-1] ** 2)
        # The quasi-Newton step has a length of its own, once there is a pair; but where there are
        # constraints that bend it may be far too long.
        whole = jnp.ones_like(lengths[-1]) if state.limits is None else lengths[-1]
        newton = jnp.minimum(jnp.where(lower, whole, lengths[-1]), 1)
        back = jnp.where(lower, jnp.minimum(16 * state.back, 1), state.back / 16)
        lengths = jnp.clip(lengths.at[-1].set(newton), SMALLEST, 1e3).astype(state.x.dtype)
        gain = jnp.where(lower, state.energy - energy[best], 0)
        gains = jnp.roll(state.gains, 1).at[0].set(gain)
        now = jnp.where(lower, energy[best], state.energy)
        enough = jnp.sum(gains) > self._notable(state, state.since, now)
        hopeless = jnp.max(lengths) <= 16 * SMALLEST
        state = dataclasses.replace(
            state,
            x=jnp.where(lower, points[best], state.x),
            energy=now,
            # Where whole steps succeed there was no kink in the way.
            held=state.held.forgets(lower & (best % KINDS == KINDS - 1) & (best < 2 * KINDS)),
            lengths=lengths,
            back=back,
            gains=gains,
            attacks=state.attacks + lower,
        )
        onward = self._look(state, lower)
        # Tangents at earlier points may have been in the way.
        crowded = ~lower & jnp.any(state.held.signs[KEPT:] != 0)
        bare = dataclasses.replace(state, held=state.held.forgets(crowded))
        onward = select(crowded, self._look(bare, crowded), onward)
        return select(crowded | (enough & ~hopeless), onward, self._others_turn(state))

    def _notable(self, state: AttackState, before: Array, now: Array) -> Array:
        """A gain to go on for: a share of what was gained so far, or of a value that falls to 0;
        where nothing is feasible, of what is left of the violation."""
        size = jnp.abs(now)
        return self.gain * jnp.where(state.feasible, jnp.minimum(before - now, size), size)

    def _look(self, state: AttackState, moved: Array) -> AttackState:
        """The next question of an attack: the gradient where x is new, else a shorter ladder."""
        key = jax.random.fold_in(state.key, state.iteration)
        ahead = dataclasses.replace(state, mode=jnp.array(GRADIENT))
        if self.samples:
            n = state.x.size
            basis = positive_basis(key, n, dtype=state.x.dtype)[: self.samples]
            steps = 0.1 * jnp.clip(state.lengths[1], 1e-6, 1.0) * basis
            rungs = jnp.concatenate([state.x[None] + steps, state.x[None] - steps])
            ahead = dataclasses.replace(ahead, rungs=self._filled(state, rungs))
        again = dataclasses.replace(state, mode=jnp.array(LADDER), rungs=self._ladder(state))
        return select(moved, ahead, again)

    # -- the others -------------------------------------------------------------------------------

    def _others_turn(self, state: AttackState) -> AttackState:
        """Those of `then` begin at the best point."""
        if not state.others:
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

    def _begun(self, state: AttackState) -> AttackState:
        x = state.box.unravel(state.box.clip(state.unit * state.x))
        bounds = (state.box.unravel(state.box.lower), state.box.unravel(state.box.upper))
        then = self._others(state.limits)
        keys = jax.random.split(jax.random.fold_in(state.key, state.iteration), len(then))
        start = Start(x, bounds, None, keys[0], _nothing, state.limits)
        others = tuple(
            solver.init(_start(start, x, key)) for solver, key in zip(then, keys, strict=True)
        )
        return dataclasses.replace(state, others=others, begins=jnp.array(False))

    def _tell_other(
        self,
        i: int,
        state: AttackState,
        query: Query,
        evaluation: Evaluation,
        points: Array,
        energy: Array,
        violation: Array,
    ) -> AttackState:
        """Tell one of them, and see whose turn is next."""
        del violation
        solver, other = self._others(state.limits)[i], state.others[i]
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
        return select(ended, self._after_turn(i, state, status), state)

    def _after_turn(self, i: int, state: AttackState, status: Any) -> AttackState:
        """Attack again where the others have moved on; else the next one's turn, for longer after a
        round of them."""
        gained = state.at_turn - state.energy
        notable = gained > self._notable(state, state.began, state.at_turn)
        count = len(state.others)
        last = i == count - 1
        burst = jnp.where(notable, state.burst, (2 if last else 1) * state.burst)
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
        waiting = select(elsewhere, self._scatter(state), waiting)
        # After a round a small gain is reason enough for an attack, which costs little.
        least = 1e-6 * jnp.abs(state.at_turn)
        again = notable | (last & state.feasible & (gained > least))
        return select(again, self._look(self._afresh(state), jnp.array(True)), waiting)

    def _afresh(self, state: AttackState) -> AttackState:
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

    # -- elsewhere --------------------------------------------------------------------------------

    def _scatter(self, state: AttackState) -> AttackState:
        """Random points within the bounds, or near x where there are none."""
        key = jax.random.fold_in(state.key, state.iteration)
        low, high = state.box.lower / state.unit, state.box.upper / state.unit
        low = jnp.where(jnp.isfinite(low), low, jnp.minimum(state.x, high) - 4)
        high = jnp.where(jnp.isfinite(high), high, jnp.maximum(state.x, low) + 4)
        shares = jax.random.uniform(key, (KINDS * len(FACTORS), state.x.size), state.x.dtype)
        return dataclasses.replace(
            state,
            rungs=self._filled(state, low[None] + shares * (high - low)[None]),
            mode=jnp.array(SCATTER),
            restarted=state.restarted + 1,
            burst=self._first_burst(state.x),
        )

    def _tell_scatter(
        self, state: AttackState, points: Array, energy: Array, violation: Array
    ) -> AttackState:
        """Attack from the point that violates least, and has the lowest value of those."""
        count = KINDS * len(FACTORS)
        points, energy, violation = points[1:][:count], energy[1:][:count], violation[1:][:count]
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
        return self._look(self._afresh(state), jnp.array(True))

    # -- the end ----------------------------------------------------------------------------------

    def terminate(self, state: AttackState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: AttackState) -> dict[str, Array]:
        return {"iteration": state.iteration, "attacks": state.attacks, "mode": state.mode}


def _named(state: AttackState, status: Any) -> Any:
    """The status, or that nothing feasible was found."""
    known = state.feasible | ~jnp.isfinite(state.energy)
    return Status.where(known, status, Status.infeasible)


def _start(start: Start, x: PyTree, key: PRNGKeyArray) -> Start:
    return Start(x, start.bounds, start.carry, key, start.answer, start.constraint_bounds)


def _padded(points: Array, mask: Array, width: int) -> tuple[Array, Array]:
    """More rows, which nobody wants."""
    more = width - mask.shape[0]
    return jnp.pad(points, ((0, more), (0, 0)), mode="edge"), jnp.pad(mask, (0, more))


def _nothing(query: Query) -> PyTree:
    raise ValueError("a solver of `then` must not ask for the shapes of answers.")


def _rows(query: Query) -> tuple[Array, Array]:
    """The points of a batch as rows, and which of them are wanted."""
    if query.mask is None or query.derivatives:
        raise ValueError("the solvers of `then` must ask for values at batches of points.")
    return flat(query.x), query.mask
