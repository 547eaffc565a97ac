"""Directional attacks: steps along the gradient through a network, at many lengths at once, and
direct search where they find nothing."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.lbfgs import add_pair, no_pairs
from tolerax.solvers._attack_state import (
    FACTORS,
    GRADIENT,
    KINDS,
    LADDER,
    OTHER,
    RUNGS,
    AttackState,
)
from tolerax.solvers._attack_steps import (
    KEPT,
    directions,
    estimated,
    none_held,
    orthogonal_rows,
    penalty_for,
    remembered,
    tangents,
    weighted,
    with_earlier,
)
from tolerax.solvers._attack_turns import Turns, notable
from tolerax.solvers._branches import when
from tolerax.solvers._common import Box, select
from tolerax.solvers._population import flat
from tolerax.solvers.cdsm import CDSM
from tolerax.solvers.model_trust_region import ModelTrustRegion, first_radius
from tolerax.status import Status, is_failed
from tolerax.validation import check_integer, check_options

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
      [`ModelTrustRegion`][] with this `tol` and `radius`, and [`CDSM`][] too where there are
      constraints, along whose edges models of a penalty jam. With an empty one a run ends where
      attacks stall.
    - `radius`: the unit of each variable, and the first length: a number or a pytree like x; by
      default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for variables without.
    - `gain`: see above. - `burst`: points of the first turn, in multiples of n + 1.
    - `restarts`: how often a run begins anew, at most.
    - `samples`: for problems that give no derivatives: estimate the gradient by central differences
      along so many random directions instead, at the length that succeeded last: orthogonal ones,
      as long as there are no more than variables; with more, a new basis for each as many.
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
        check_options(self, positive="gain burst penalty feasible_within tol")
        for name, least in (("samples", 0), ("restarts", 0), ("memory", 1)):
            check_integer(name, getattr(self, name), least)

    def _others(self, limits: tuple[PyTree, PyTree] | None) -> tuple[Solver, ...]:
        if self.then is not None:
            return self.then
        # Their fields are set afterwards, since they may be traced.
        models = eqx.tree_at(
            lambda s: s.tol, ModelTrustRegion(radius=self.radius, batch=16), self.tol
        )
        if limits is None:
            return (models,)
        fields = (self.tol, self.feasible_within)
        cover = CDSM(radius=self.radius)
        return models, eqx.tree_at(lambda s: (s.tol, s.feasible_within), cover, fields)

    def _turns(self, limits: tuple[PyTree, PyTree] | None) -> Turns:
        return Turns(
            self._others(limits),
            self.gain,
            self.burst,
            self.restarts,
            self.penalty,
            self.feasible_within,
            self.memory,
        )

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
        turns = self._turns(start.constraint_bounds)
        keys = jax.random.split(start.key, len(turns.then) + 1)
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
            others=turns.opened(start, keys[1:]),
            begins=jnp.array(False),
            turn=count,
            spent=count,
            burst=turns.first_burst(u),
            over=jnp.zeros(len(turns.then), bool),
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

    def _rungs(self) -> int:
        return max(RUNGS, 2 * self.samples)

    # -- ask --------------------------------------------------------------------------------------

    def ask(self, state: AttackState) -> Query:
        x = state.box.clip(state.unit * state.x)
        asked = [self._attack(state), *self._turns(state.limits).asked(state)]
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
        count = jnp.where(state.mode == GRADIENT, 2 * self.samples, RUNGS)
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
        turns, new = self._turns(state.limits), jnp.array(True)

        def other(i: int) -> AttackState:
            after, again = turns.told(i, state, query, evaluation, points, energy)
            return select(again, self._look(after, new), after)

        branches = [
            lambda: self._tell_gradient(state, evaluation, *told),
            lambda: self._tell_ladder(state, points, energy),
            lambda: self._look(turns.elsewhere(state, *told), new),
        ]
        branches += [lambda i=i: other(i) for i in range(len(turns.then))]
        which = jnp.where(state.mode == OTHER, OTHER + state.turn, state.mode)
        state = jax.lax.switch(which, branches)
        if not turns.then:
            return state
        # In one place for all branches: the code of other solvers is long to compile.
        return when(state.begins, turns.begun, lambda state: state, state)

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
        return select(usable, state, self._turns(state.limits).taken(state))

    def _ladder(self, state: AttackState) -> Array:
        factors = jnp.asarray(FACTORS, state.x.dtype)
        steps = factors[:, None, None] * (state.lengths[:, None] * state.kinds)[None]
        back = jnp.minimum(4 * factors, 1)[:, None, None] * state.back * state.normal[None, None]
        rungs = state.x[None] + (back - steps).reshape(-1, state.x.size)
        return state.filled(rungs)

    def _tell_ladder(self, state: AttackState, points: Array, energy: Array) -> AttackState:
        """The lowest rung, if it is lower; where that is not enough, the turn of the others."""
        points, energy = points[1 : 1 + RUNGS], energy[1 : 1 + RUNGS]
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
        enough = jnp.sum(gains) > notable(self.gain, state, state.since, now)
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
        others = self._turns(state.limits).taken(state)
        return select(crowded | (enough & ~hopeless), onward, others)

    def _look(self, state: AttackState, moved: Array) -> AttackState:
        """The next question of an attack: the gradient where x is new, else a shorter ladder."""
        key = jax.random.fold_in(state.key, state.iteration)
        ahead = dataclasses.replace(state, mode=jnp.array(GRADIENT))
        if self.samples:
            basis = orthogonal_rows(key, self.samples, state.x)
            steps = 0.1 * jnp.clip(state.lengths[1], 1e-6, 1.0) * basis
            rungs = jnp.concatenate([state.x[None] + steps, state.x[None] - steps])
            ahead = dataclasses.replace(ahead, rungs=state.filled(rungs))
        again = dataclasses.replace(state, mode=jnp.array(LADDER), rungs=self._ladder(state))
        return select(moved, ahead, again)

    # -- the end ----------------------------------------------------------------------------------

    def terminate(self, state: AttackState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: AttackState) -> dict[str, Array]:
        return {"iteration": state.iteration, "attacks": state.attacks, "mode": state.mode}


def _padded(points: Array, mask: Array, width: int) -> tuple[Array, Array]:
    """More rows, which nobody wants."""
    more = width - mask.shape[0]
    return jnp.pad(points, ((0, more), (0, 0)), mode="edge"), jnp.pad(mask, (0, more))
