"""Consensus-based optimization: particles that drift to where they agree the minimum is."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Start
from tolerax.inner.noise import LARGE, fold_in, normal, uniform
from tolerax.inner.particles import blocks_of, distributed, everywhere, replicated, total, when
from tolerax.solvers._cbo_state import CBOState
from tolerax.solvers._common import Box, select
from tolerax.solvers._constraint_drift import implicit_step, linearized
from tolerax.solvers._population import (
    LEAST_PROBES,
    Population,
    batch_query,
    check_count,
    check_spread,
    first_ensemble,
    flat,
    probe_lengths,
    probed,
    refuse_bounds,
    scale_like,
)
from tolerax.solvers.consensus import (
    Agreement,
    Anisotropic,
    Consensus,
    Covariance,
    HardMinimum,
    Noise,
)
from tolerax.solvers.manifolds import MirrorMap
from tolerax.status import PointStatus, Status
from tolerax.validation import check_options, is_concrete

Positions = Float[Array, "n d"]
MOST_PROBES = 256


class CBO(Population):
    """Consensus-based optimization: global minimization by values at N particles a step.

    In every step the particles agree on a point m (see `consensus`) and move by

        x <- x - lambda dt (x - m) + noise(x - m)

    Particles that fail (NaN, infinite, an exception) get weight 0 and are put where another one is;
    the run ends when as many points on end fail as there are particles.
    The run ends when more than half of the particles agree in every coordinate to within
    `tol * (1 + |m|)`, for more than `patience` steps on end, and at least 64 probes around the best
    point, at all distances up to the spread of the start, find no lower value (if one does, the
    particles continue from the probes). That the point is the global minimum is never certain;
    `Status.consensus` says so.

    - `particles`: N.
    - `consensus`: [`HardMinimum`][], [`SoftConsensus`][], [`EffectiveSampleSize`][],
      [`RankWeights`][], [`Polarized`][] or [`Quantile`][].
    - `noise`: [`Anisotropic`][], [`Isotropic`][] or [`Covariance`][]. For landscapes that are
      rotated or badly scaled: `CBO(particles=750, consensus=RankWeights(), noise=Covariance())`.
    - `drift`: lambda; `dt`: the time step.
    - `spread`: the particles start normally distributed about `x0` with this standard deviation (a
      pytree like x, or a number); uniformly within the bounds where all of them are finite.
    - `ensemble`: the particles to start from instead: a pytree like x with a leading axis of N.
      `spread` then counts in the coordinates in which they are all the same.
    - `batch`: only so many particles, drawn anew in every step, are evaluated and moved.
    - `memory`: drift to the best point that each particle has seen, with this rate times dt.
    - `gradient`: drift along the negative gradient, with this rate times dt; asks for gradients.
    - `retract`: maps every particle back to a set, for instance [`Sphere`][]; called with the point
      as a pytree like x. Not together with bounds.
    - `mirror`: the particles stay on the image of this [`MirrorMap`][], for instance [`Simplex`][]:
      they are moved in its dual space, where `spread` counts too. Not together with `retract`,
      bounds or [`Covariance`][].
    - `constraint_drift`: drift towards where the constraints hold, with this rate times dt, by an
      implicit step on half the sum of their squared violations; asks for their derivatives. A step
      along equality constraints is free, one away from them is shortened.
    - `penalty`: weight of the `violation` of a point in its energy `value + penalty * violation`.
      It grows by half in every step in which the best particle violates more than `feasible_within`
      and half of what is usual among the particles, or in which they agree; with a
      `constraint_drift` it stays.
    - `patience`: steps of agreement before the run may end; until then jumps go on looking for a
      lower value. A large number uses up the budget.
    - `accuracy`: what is asked of problems whose values are not exact; the upper end of the
      interval of a value is its energy.
    - `sharding`: a `NamedSharding` of the leading axis, to spread the particles over devices. They
      are evaluated and summed in 64 blocks, so that the number of devices decides nothing (of
      [`Covariance`][]: nothing but rounding).

    Source: Pinnau, Totzeck, Tse, Martin (*M3AS* 27, 2017); Carrillo, Jin, Li, Zhu (*ESAIM: COCV*
    27, 2021); memory: Riedl (arXiv 2211.12184); mirror maps: Bungert, Hoffmann, Kim, Roith
    (arXiv 2501.12189), here with the drift in the dual space as well; drift to constraints:
    Carrillo, Jin, Zhang, Zhu (arXiv 2405.00891), here with a Gauss-Newton matrix in the place of
    second derivatives of the constraints.

    >>> import jax.numpy as jnp, tolerax
    >>> rastrigin = lambda x: jnp.mean(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)
    >>> problem = tolerax.Objective(rastrigin, bounds=(-3.0, 5.0))
    >>> solution = tolerax.solve(problem, tolerax.CBO(), jnp.zeros(5) + 2.5)
    >>> bool(jnp.all(jnp.abs(solution.x) < 1e-2)), bool(solution.success)
    (True, True)
    """

    particles: int = eqx.field(static=True, default=100)
    consensus: Consensus = eqx.field(default_factory=HardMinimum)
    noise: Noise = eqx.field(default_factory=Anisotropic)
    drift: float = 1.0
    dt: float = 0.01
    spread: PyTree = 1.0
    ensemble: PyTree = None
    batch: int | None = eqx.field(static=True, default=None)
    memory: float | None = None
    gradient: float | None = None
    retract: Callable[[PyTree], PyTree] | None = None
    mirror: MirrorMap | None = None
    constraint_drift: float | None = None
    penalty: float = 1.0
    feasible_within: float = 1e-6
    tol: float = 1e-4
    patience: int = 50
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count(self, "particles")
        check_spread(self.spread)
        check_options(
            self,
            positive="drift dt penalty tol memory gradient constraint_drift",
            at_least_0="feasible_within patience",
        )
        if self.batch is not None and self.batch not in range(2, self.particles + 1):
            raise ValueError(f"batch is {self.batch!r}: give 2 to {self.particles} particles.")
        for leaf in jax.tree.leaves(self.ensemble):
            if is_concrete(leaf) and not np.isfinite(np.asarray(leaf)).all():
                raise ValueError("ensemble has entries that are not finite: leave them out.")
        for name in ("memory", "gradient"):
            if getattr(self, name) is not None and not self.noise.drifts:
                raise ValueError(
                    f"{name} is a drift, and {type(self.noise).__name__} has none: leave it out."
                )
        if self.mirror is not None and (
            self.retract is not None or isinstance(self.noise, Covariance)
        ):
            raise ValueError(
                f"mirror is {self.mirror} with retract {self.retract} and noise {self.noise}: take "
                "one of mirror and retract, and noise that is added to a step."
            )
        if self.sharding is not None and blocks_of(self.particles) % self.sharding.num_devices:
            raise ValueError(
                f"particles is {self.particles}, but sharding has {self.sharding.num_devices} "
                "devices: give a multiple of 64 particles and at most 64 devices."
            )

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

    def init(self, start: Start) -> CBOState:
        x0, _ = ravel_pytree(start.x)
        refuse_bounds(start, mirror=self.mirror, retract=self.retract)
        box = Box.of(start)
        key, first = jax.random.split(start.key)
        bounded = jnp.all(jnp.isfinite(box.lower) & jnp.isfinite(box.upper))
        x = self._ensemble(start, x0, box, bounded, first)
        if self.mirror is not None:
            drawn = x - x0[None] + self._dual(x0[None])
            x = self._dual(x) if self.ensemble is not None else drawn
        x = distributed(self._primal(box, x), self.sharding)
        inf, false = jnp.array(jnp.inf, x.dtype), jnp.array(False)
        limits = None
        if self.constraint_drift is not None:
            if start.constraint_bounds is None:
                raise ValueError("constraint_drift is given, but the problem has no constraints.")
            low, high = (ravel_pytree(side)[0].astype(x.dtype) for side in start.constraint_bounds)
            limits = (low, high)
        memory = None
        if self.memory is not None:
            nothing = jnp.zeros(self.particles, x.dtype)
            memory = (x, nothing + jnp.inf, nothing)
        # Where all particles are the same, probes and jumps go as far as the spread says.
        whole = self._dual(replicated(x, self.sharding))
        scale = jnp.std(whole, axis=0)
        scale = jnp.where(whole[0] + scale == whole[0], scale_like(self.spread, start.x), scale)
        return CBOState(
            x=x,
            noise=everywhere(self.noise.init, self.sharding, x),
            memory=memory,
            consensus=x0,
            best=inf,
            best_violation=jnp.zeros_like(inf),
            best_x=x0,
            effective=jnp.array(self.particles, x.dtype),
            width=inf,
            penalty=jnp.asarray(self.penalty, x.dtype),
            scale=scale,
            step=jnp.array(0, jnp.int32),
            agreeing=jnp.array(0, jnp.int32),
            key=key,
            box=box,
            limits=limits,
            probing=false,
            probes=jnp.array(0, jnp.int32),
            failing=jnp.array(0, jnp.int32),
            done=false,
            status=Status.running,
        )

    def check(self, x0: PyTree) -> None:
        """Say so when noise beats drift: then particles never agree."""
        leaves = jax.tree.leaves((self.noise, self.drift, self.dt))
        if not is_concrete(leaves):
            return
        d = sum(leaf.size for leaf in jax.tree.leaves(x0))
        growth = self.noise.contraction(float(self.drift * self.dt), d)
        if growth >= 0:
            warnings.warn(
                f"noise is {self.noise}: with drift * dt = {float(self.drift * self.dt):.3g} the "
                f"distance to the consensus grows by a factor {np.exp(growth):.3g} a step in "
                "the mean, so particles will not agree. Take a smaller s, or a larger drift * dt.",
                stacklevel=2,
            )

    def _ensemble(
        self, start: Start, x0: Array, box: Box, bounded: Array, key: PRNGKeyArray
    ) -> Positions:
        n, d = self.particles, x0.size
        if self.ensemble is not None:
            return first_ensemble(start, box, n, self.spread, self.ensemble, key)
        uniform, gaussian = jax.random.split(key)
        around = x0[None] + scale_like(self.spread, start.x)[None] * normal(
            gaussian, jnp.zeros((n, d), x0.dtype)
        )
        low, high = (jnp.where(bounded, side, 0) for side in (box.lower, box.upper))
        within = low[None] + (high - low)[None] * jax.random.uniform(uniform, (n, d), x0.dtype)
        x = jnp.where(bounded, within, around)
        # The start point is one of them.
        return x.at[0].set(x0)

    def _primal(self, box: Box, y: Positions) -> Positions:
        """Points, put where they may be."""

        def put(y: Array) -> Array:
            if self.mirror is not None:
                return self.mirror(y)
            if self.retract is not None:
                return ravel_pytree(self.retract(box.unravel(y)))[0]
            return box.clip(y)

        return jax.vmap(put)(y)

    def _dual(self, x: Positions) -> Positions:
        """Points where steps are taken."""
        return x if self.mirror is None else jax.vmap(self.mirror.inverse)(x)

    # -- ask --------------------------------------------------------------------------------------

    def _key(self, state: CBOState, purpose: Int[Array, ""] | int) -> PRNGKeyArray:
        """A key for each step and each of four purposes."""
        return fold_in(state.key, 4 * state.step + purpose)

    def _members(self, state: CBOState) -> Array:
        """The particles that are evaluated in this step."""
        return jax.random.permutation(self._key(state, 2), self.particles)[: self.batch]

    def _asked(self, state: CBOState) -> Positions:
        """The particles, the first ones in exchange for probes where it is time for them."""
        x = state.x if self.batch is None else state.x[self._members(state)]
        first = x[: min(x.shape[0], MOST_PROBES)]
        first = when(state.probing, lambda first, now: self._probes(state, first, now), first)
        return jax.lax.dynamic_update_slice(x, first, (0, 0))

    def _probes(self, state: CBOState, like: Positions, now: Array) -> Positions:
        """Points around the best one, at distances that halve from the spread of the start."""
        count = like.shape[0]
        key = self._key(state, 2 + now)
        length = probe_lengths(count, like.dtype, state.probes)[:, None]
        around = self._dual(state.best_x[None])
        return self._primal(state.box, around + length * state.scale[None] * normal(key, like))

    def ask(self, state: CBOState) -> Query:
        over = self.sharding if self.batch is None else None
        x = distributed(self._asked(state), over)
        derivatives = int(self.gradient is not None or self.constraint_drift is not None)
        return batch_query(x, state.box, self.accuracy, derivatives, over)

    # -- tell -------------------------------------------------------------------------------------

    def tell(self, state: CBOState, query: Query, evaluation: Evaluation) -> CBOState:
        dtype = state.x.dtype
        ok = (evaluation.status != PointStatus.failed) & query.mask
        # Of a value that is an interval the upper end counts.
        value = (evaluation.value + evaluation.value_error).astype(dtype)
        ok = ok & ~jnp.isnan(value) & (value < jnp.inf)
        violation = jnp.zeros_like(value)
        if evaluation.violation is None and self.consensus.of_violations:
            raise ValueError(
                f"consensus is {self.consensus}, but the points of this problem have no "
                "`violation`: give the problem constraints, or use another consensus."
            )
        if evaluation.violation is not None:
            violation = jnp.where(ok, evaluation.violation.astype(dtype), jnp.inf)
        energy = jnp.where(ok, value + state.penalty * violation, jnp.inf)
        energy = replicated(energy, self.sharding)
        x = flat(query.x)
        lowest = jnp.argmin(energy)
        lower = energy[lowest] < state.best
        gradient = None
        if self.gradient is not None:
            gradient = flat(evaluation.gradient)
        now = dataclasses.replace(
            state,
            best=jnp.where(lower, energy[lowest], state.best),
            best_violation=jnp.where(lower, violation[lowest], state.best_violation),
            best_x=jnp.where(lower, x[lowest], state.best_x),
        )
        pull = None
        if state.limits is not None:
            pull = linearized(evaluation, state.limits)
        moved = self._moved(now, x, energy, violation, ok, gradient, pull)
        # After probes the particles go on from there when one of them was lower, else all is over.
        # Selecting is cheaper than a conditional, which would copy all particles.
        held = jnp.where(lower, self._placed(state, x), state.x)
        probes = state.probes + min(x.shape[0], MOST_PROBES)
        done = ~lower & (probes >= LEAST_PROBES)
        ended = probed(self._dual(state.best_x[None])[0], state.scale)
        after = dataclasses.replace(
            now,
            x=distributed(held, self.sharding),
            step=state.step + 1,
            agreeing=jnp.zeros_like(state.agreeing),
            probing=~lower & ~done,
            probes=jnp.where(lower, 0, probes),
            done=done,
            status=Status.where(done, ended, Status.running),
        )
        new = select(state.probing, after, moved)
        if evaluation.violation is not None and self.constraint_drift is None:
            new = self._dearer(new, violation, ok, lowest)
        failed = ~jnp.any(ok)
        if self.batch is not None:
            # There is nothing to agree on, but others may have values.
            waiting = dataclasses.replace(state, step=state.step + 1)
            new = select(failed & ~state.probing, waiting, new)
        failing = jnp.where(failed, state.failing + x.shape[0], 0)
        lost = failing >= self.particles
        return dataclasses.replace(
            new,
            failing=failing,
            done=new.done | lost,
            status=Status.where(lost, Status.all_failed, new.status),
        )

    def _dearer(self, state: CBOState, violation: Array, ok: Array, lowest: Array) -> CBOState:
        """With a larger penalty where the best particle needs it, for what is remembered too.

        Particles on both sides of where constraints hold violate them less and less as they agree:
        a penalty that grew meanwhile would take the values out of sight.
        """
        usual = jnp.nanquantile(jnp.where(ok, violation, jnp.nan), 0.5, method="lower")
        far = (violation[lowest] > 0.5 * usual) | (state.agreeing > 0)
        hard = (violation[lowest] > self.feasible_within) & far & ok[lowest]
        most = jnp.sqrt(jnp.finfo(violation.dtype).max)  # reached where nothing is feasible
        more = jnp.where(hard, jnp.clip(most - state.penalty, 0, 0.5 * state.penalty), 0)
        memory = state.memory
        if memory is not None:
            x, energy, theirs = memory
            memory = (x, energy + more * theirs, theirs)
        return dataclasses.replace(
            state,
            memory=memory,
            best=state.best + more * state.best_violation,
            penalty=state.penalty + more,
        )

    def _placed(self, state: CBOState, x: Float[Array, "m d"]) -> Positions:
        """All particles, with those that were evaluated at x."""
        return x if self.batch is None else state.x.at[self._members(state)].set(x)

    def _replaced(self, state: CBOState, x: Positions, ok: Bool[Array, " n"]) -> Positions:
        """Failed particles put where others are, drawn at random."""
        key, any_failed = self._key(state, 1), jnp.sum(ok) < ok.size

        def donors(now: Array) -> Int[Array, " n"]:
            rank = jnp.cumsum(ok & now)
            drawn = uniform(fold_in(key, now.astype(jnp.int32)), ok.size)
            return jnp.searchsorted(rank, (jnp.floor(rank[-1] * drawn) + 1).astype(rank.dtype))

        if x.size <= LARGE:
            change = lambda x, now: jnp.where(ok[:, None], x, x[donors(now)])  # noqa: E731
            return when(any_failed, change, x)
        # A loop would hold the particles twice.
        rows = jnp.arange(ok.size)
        change = lambda rows, now: jnp.where(ok, rows, donors(now))  # noqa: E731
        return x[when(any_failed, change, rows)]

    def _moved(
        self,
        state: CBOState,
        x: Positions,
        energy: Array,
        violation: Array,
        ok: Array,
        gradient: Positions | None,
        pull: tuple[Array, Array] | None,
    ) -> CBOState:
        """One step of the particles."""
        over = self.sharding if self.batch is None else None
        members = None if self.batch is None else self._members(state)
        memory = state.memory
        anchor, anchor_energy = x, energy
        if memory is not None:
            old = jax.tree.map(lambda m: m if members is None else m[members], memory)
            better = energy < old[1]
            anchor = jnp.where(better[:, None], x, old[0])
            anchor_energy = jnp.where(better, energy, old[1])
            violation = jnp.where(better, violation, old[2])
        agreed: Agreement = self.consensus(anchor, anchor_energy, violation, state.step, over)
        m = agreed.point
        dual_m = self._dual(m)
        placed = self._replaced(state, x, ok)
        u = self._dual(placed) - dual_m
        drifted = (1 - self.drift * self.dt) * u
        if memory is not None and self.memory is not None:
            back = self._dual(placed) - self._dual(anchor)
            drifted = drifted - self.memory * self.dt * jnp.where(ok[:, None], back, 0)
        if gradient is not None and self.gradient is not None:
            usable = ok[:, None] & jnp.isfinite(gradient)
            drifted = drifted - self.gradient * self.dt * jnp.where(usable, gradient, 0)
        noise_memory = self.noise.update(state.noise, placed, agreed, over)
        key, weights = self._key(state, 0), agreed.weights
        noise = self.noise(key, u, drifted, state.scale, weights, noise_memory, over)
        if pull is not None and self.constraint_drift is not None:
            rate = self.constraint_drift * self.dt
            noise = u + jax.vmap(lambda *of: implicit_step(rate, *of))(noise - u, ok, *pull)
        moved = self._primal(state.box, dual_m + noise)

        def near(x: Array, ok: Array, m: Array = m) -> Array:
            return ((jnp.abs(x - m) <= self.tol * (1 + jnp.abs(m))) & ok[:, None]).astype(x.dtype)

        def distance(x: Array, ok: Array, m: Array = m) -> Array:
            return jnp.where(ok[:, None], jnp.abs(self._dual(x) - self._dual(m)), 0)

        seen = (x, ok) if m.shape[0] == 1 else (x, ok, m)
        agree = jnp.min(total(near, *seen, over=over)) > 0.5 * x.shape[0]
        width = jnp.max(total(distance, *seen, over=over)) / jnp.maximum(jnp.sum(ok), 1)
        agreeing = jnp.where(agree, state.agreeing + 1, 0)
        if memory is not None:
            memory = jax.tree.map(
                lambda old, new: new if members is None else old.at[members].set(new),
                memory,
                (anchor, anchor_energy, violation),
            )
        return dataclasses.replace(
            state,
            x=distributed(self._placed(state, moved), self.sharding),
            noise=noise_memory,
            memory=memory,
            consensus=jnp.mean(m, axis=0),
            effective=agreed.effective,
            width=width,
            step=state.step + 1,
            agreeing=agreeing,
            probing=agreeing > self.patience,
        )

    def terminate(self, state: CBOState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: CBOState) -> dict[str, Array]:
        return {"iteration": state.step, "spread": state.width, "effective": state.effective}
