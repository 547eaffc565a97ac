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
    SCATTER,
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
from tolerax.solvers._attack_turns import Schedule, notable
from tolerax.solvers._best import Best
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

    Attacks and the solvers of `then` take turns of `burst (n + 1)` points, the first one three
    times as long. The next turn is that of the one that has spent least for what it finds: points,
    over `(1 + wins)^2`, where a win is a turn that has lowered the best value by a share `gain` of
    what it was lowered by so far, or of the value. (The last of `then` may spend as much as all
    others together.) So what finds little keeps a share of the budget, and what leads has most of
    it, whatever the budget. In its next turn a solver goes on from its own state. It begins anew at
    the best point where it has ended, or is behind without having come half as near. Attacks end
    where they stall (the last three together are no win; or the gradient is zero, as in the flat
    parts of a network). Then they begin anew at the best point, if that is another one, or else at
    a random one: the lowest of those of 16 that violate least.

    What was found long ago counts less, by a twentieth with each turn. Once a solver of `then` has
    ended at the best point, attacks from random points follow, until one ends elsewhere.

    A run goes on until its budget is spent, unless its end is agreed upon: a solver of `then` has
    ended at the best point, no other one has spent less of late, and six attacks from random points
    have ended there as well and none elsewhere. (Of seven searches that all end in one minimum, the
    share of starts that lead to another one is expected to be 1/21.) Without finite bounds no point
    is random enough; there the end of the first must have been a success.

    All of this is heuristic: since the solvers of `then` may begin anew, a run inherits none of
    their guarantees.

    - `then`: a tuple of solvers that ask for values at batches of points; by default [`CDSM`][] and
      a [`ModelTrustRegion`][] that explores, with this `tol` and `radius`. With an empty one a run
      ends where attacks stall.
    - `radius`: the unit of each variable, and the first length: a number or a pytree like x; by
      default a fifth of the distance of the bounds, and `max(1, |x0|) / 2` for variables without.
    - `gain`, `burst`: see above.
    - `samples`: for problems that give no derivatives: estimate the gradient by central differences
      along so many random directions instead, at the length that succeeded last: orthogonal ones,
      as long as there are no more than variables; with more, a new basis for each as many.
    - `memory`: L-BFGS pairs.
    - `penalty`: weight of the `violation` of a point; grows by half whenever the attacked point
      violates more than `feasible_within`.
    - `accuracy`: what is asked of problems whose values are not exact.

    Source: the signs are those of the attack of Goodfellow, Shlens, Szegedy (ICLR 2015); a hybrid
    of it and direct search is due to Bouchet, Vidal (arXiv 2510.01461). Ladder, quasi-Newton
    direction, tangents and turns are our own. For the share: Boender, Rinnooy Kan (*Mathematical
    Programming* 37, 1987).

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
    burst: float = 3.0
    samples: int = eqx.field(static=True, default=0)
    memory: int = eqx.field(static=True, default=10)
    penalty: float = 1.0
    feasible_within: float = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-6, 1e-6))

    def __check_init__(self):
        check_options(self, positive="gain burst penalty feasible_within tol")
        for name, least in (("samples", 0), ("memory", 1)):
            check_integer(name, getattr(self, name), least)

    def _others(self) -> tuple[Solver, ...]:
        if self.then is not None:
            return self.then
        # Their fields are set afterwards, since they may be traced.
        fields = (self.tol, self.feasible_within)
        cover = CDSM(radius=self.radius)
        models = ModelTrustRegion(radius=self.radius, explore=True, batch=16)
        return (
            eqx.tree_at(lambda s: (s.tol, s.feasible_within), cover, fields),
            eqx.tree_at(lambda s: (s.tol, s.feasible_within), models, fields),
        )

    def _schedule(self) -> Schedule:
        return Schedule(
            self._others(),
            self.gain,
            self.burst,
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
        schedule = self._schedule()
        u = x0 / unit
        return AttackState(
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
            mode=jnp.array(GRADIENT),
            next=jnp.array(GRADIENT),
            since=inf,
            gains=jnp.full(3, jnp.inf, dtype),
            random=jnp.array(False),
            best=Best.unknown(u, self.feasible_within),
            turns=schedule.first(u),
            others=schedule.unopened(start),
            penalty=jnp.asarray(self.penalty, dtype),
            iteration=count,
            attacks=count,
            unit=unit,
            box=box,
            limits=start.constraint_bounds,
            key=start.key,
            done=jnp.array(False),
            status=Status.running,
        )

    # -- ask --------------------------------------------------------------------------------------

    def ask(self, state: AttackState) -> Query:
        x = state.box.clip(state.unit * state.x)
        asked = [self._attack(state), *self._schedule().asked(state)]
        width = max(mask.shape[0] for _, mask in asked)
        which = jnp.where(state.mode == OTHER, state.turns.number, 0)
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
        """The rungs of the ladder, random points to begin from, or the samples for a gradient."""
        rungs = jnp.where(
            state.mode == SCATTER, self._schedule().scattered(state), self._ladder(state)
        )
        count = jnp.where(state.mode == GRADIENT, 2 * self.samples, RUNGS)
        if self.samples:
            key = jax.random.fold_in(state.key, state.iteration)
            basis = orthogonal_rows(key, self.samples, state.x)
            steps = 0.1 * jnp.clip(state.lengths[1], 1e-6, 1.0) * basis
            around = jnp.concatenate([state.x[None] + steps, state.x[None] - steps])
            size = max(RUNGS, 2 * self.samples)
            fill = lambda rows: jnp.pad(rows, ((0, size - len(rows)), (0, 0)), mode="edge")  # noqa: E731
            rungs = jnp.where(state.mode == GRADIENT, fill(around), fill(rungs))
        low, high = state.box.lower[None], state.box.upper[None]
        return jnp.clip(state.unit[None] * rungs, low, high), jnp.arange(len(rungs)) < count

    def _ladder(self, state: AttackState) -> Array:
        factors = jnp.asarray(FACTORS, state.x.dtype)
        steps = factors[:, None, None] * (state.lengths[:, None] * state.kinds)[None]
        back = jnp.minimum(4 * factors, 1)[:, None, None] * state.back * state.normal[None, None]
        return state.x[None] + (back - steps).reshape(-1, state.x.size)

    # -- tell -------------------------------------------------------------------------------------

    def tell(self, state: AttackState, query: Query, evaluation: Evaluation) -> AttackState:
        assert query.mask is not None
        dtype = state.x.dtype
        value = (evaluation.value + evaluation.value_error).astype(dtype)
        ok = query.mask & ~is_failed(evaluation.status) & (value < jnp.inf)
        violation = jnp.zeros_like(value)
        if evaluation.violation is not None:
            violation = jnp.where(ok, evaluation.violation.astype(dtype), 0)
        value = jnp.where(ok, value, jnp.inf)
        energy = value + state.penalty * violation
        points = flat(query.x) / state.unit[None]
        schedule = self._schedule()
        state = schedule.credited(state, points, value, violation, jnp.sum(query.mask))
        told = (points, energy, violation)
        branches = [
            lambda: self._tell_gradient(state, evaluation, *told),
            lambda: self._tell_ladder(state, points, energy),
            lambda: schedule.elsewhere(state, *told),
        ]
        for i in range(len(schedule.then)):
            branches.append(lambda i=i: schedule.told(i, state, query, evaluation, energy))
        which = jnp.where(state.mode == OTHER, LADDER + 1 + state.turns.number, state.mode)
        state = jax.lax.switch(which, branches)
        if not schedule.then:
            return when(state.turns.over[0], schedule.ended, _same, state)
        # In one place for all branches: the code of other solvers is long to compile.
        return when(state.turns.ends, schedule.following, _same, state)

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
            count = 2 * self.samples
            g = estimated(points[1 : 1 + count], energy[1 : 1 + count])
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
        # In the new penalty, or every gain would look large beside what was gained before; and what
        # was gained on the way to a feasible point says nothing of gains beyond.
        old = jnp.isfinite(state.since) & ~arrived
        since = jnp.where(old, state.since + more * violation[0], now)
        turns = state.turns
        turns = dataclasses.replace(turns, ends=~usable, over=turns.over.at[0].set(~usable))
        return dataclasses.replace(
            state,
            energy=now,
            violation=violation[0],
            penalty=state.penalty + more,
            normal=found.normal,
            kinds=found.along,
            before=(state.x, found.total),
            momentum=jnp.where(usable, 0.9 * state.momentum + found.slope, state.momentum),
            since=since,
            mode=jnp.array(LADDER),
            turns=turns,
        )

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
        enough = jnp.sum(gains) > self._least(state, now)
        hopeless = jnp.max(lengths) <= 16 * SMALLEST
        # Tangents at earlier points may have been in the way.
        crowded = ~lower & jnp.any(state.held.signs[KEPT:] != 0)
        over = ~crowded & (~enough | hopeless)
        onward = jnp.where(lower | crowded, GRADIENT, LADDER)
        turns, long = state.turns, self._schedule().long(state)
        turns = dataclasses.replace(turns, ends=over | long, over=turns.over.at[0].set(over))
        # Where whole steps succeed there was no kink in the way.
        straight = lower & (best % KINDS == KINDS - 1) & (best < 2 * KINDS)
        return dataclasses.replace(
            state,
            x=jnp.where(lower, points[best], state.x),
            energy=now,
            held=state.held.forgets(straight | crowded),
            lengths=lengths,
            back=back,
            gains=gains,
            attacks=state.attacks + lower,
            mode=onward,
            next=onward,
            turns=turns,
        )

    def _least(self, state: AttackState, now: Array) -> Array:
        """The gain of three attacks for which another is made: a notable one, or, from a random
        point, as little as it takes to tell its end from the best point."""
        schedule = self._schedule()
        large = notable(self.gain, state.best.feasible, state.since, now)
        close = state.random & (now - state.best.value <= large)
        return jnp.where(close, jnp.minimum(schedule.near(state), large), large)

    # -- the end ----------------------------------------------------------------------------------

    def terminate(self, state: AttackState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: AttackState) -> dict[str, Array]:
        return {"iteration": state.iteration, "attacks": state.attacks, "mode": state.mode}


def _same(state: AttackState) -> AttackState:
    return state


def _padded(points: Array, mask: Array, width: int) -> tuple[Array, Array]:
    """More rows, which nobody wants."""
    more = width - mask.shape[0]
    return jnp.pad(points, ((0, more), (0, 0)), mode="edge"), jnp.pad(mask, (0, more))
