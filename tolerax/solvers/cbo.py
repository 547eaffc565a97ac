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

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.noise import fold_in, normal, uniform
from tolerax.inner.particles import blocks_of, distributed, replicated, total, when
from tolerax.solvers._common import Box, select
from tolerax.solvers.consensus import Agreement, Anisotropic, Consensus, HardMinimum, Noise
from tolerax.status import PointStatus, Status
from tolerax.validation import is_concrete

Positions = Float[Array, "n d"]
PROBE_LADDER = 12.0  # halvings from the spread of the start down to the smallest probe
MOST_PROBES = 256


class CBOState(eqx.Module):
    """What evolves: the particles, their consensus, the best of the memory, the mode."""

    x: Positions
    noise: Any
    memory: tuple[Positions, Float[Array, " n"], Float[Array, " n"]] | None
    consensus: Float[Array, " d"]
    best: Float[Array, ""]
    best_violation: Float[Array, ""]
    best_x: Float[Array, " d"]
    effective: Float[Array, ""]
    width: Float[Array, ""]
    penalty: Float[Array, ""]
    scale: Float[Array, " d"]
    step: Int[Array, ""]
    agreeing: Int[Array, ""]
    key: PRNGKeyArray
    box: Box
    probing: Bool[Array, ""]
    done: Bool[Array, ""]
    status: Any


class CBO(Solver):
    """Consensus-based optimization: global minimization by values at N particles a step.

    In every step the particles agree on a point m (see `consensus`) and move by

        x <- x - lambda dt (x - m) + noise(x - m)

    Particles that fail (NaN, infinite, an exception) get weight 0 and are put where another one is.
    The run ends when at least half of the particles agree in every coordinate to within
    `tol * (1 + |m|)`, for more than `patience` steps on end, and probes around m, at all distances
    up to the spread of the start, find no lower value (if one does, the particles continue from the
    probes). That the point is the global minimum is never certain; `Status.consensus` says so.

    - `particles`: N.
    - `consensus`: [`HardMinimum`][], [`SoftConsensus`][], [`EffectiveSampleSize`][],
      [`RankWeights`][], [`Polarized`][] or [`Quantile`][].
    - `noise`: [`Anisotropic`][], [`Isotropic`][] or [`Covariance`][]. For landscapes that are
      rotated or badly scaled: `CBO(particles=750, consensus=RankWeights(), noise=Covariance())`.
    - `drift`: lambda; `dt`: the time step.
    - `spread`: the particles start normally distributed about `x0` with this standard deviation (a
      pytree like x, or a number); uniformly within the bounds where all of them are finite.
    - `ensemble`: the particles to start from instead: a pytree like x with a leading axis of N.
    - `batch`: only so many particles, drawn anew in every step, are evaluated and moved.
    - `memory`: drift to the best point that each particle has seen, with this rate times dt.
    - `gradient`: drift along the negative gradient, with this rate times dt; asks for gradients.
    - `retract`: maps every particle back to a set, for instance [`Sphere`][]; called with the point
      as a pytree like x.
    - `penalty`: weight of the `violation` of a point in its energy `value + penalty * violation`;
      grows by half in every step in which the best particle violates more than `feasible_within`.
    - `patience`: steps of agreement before the run may end; until then jumps go on looking for a
      lower value. A large number uses up the budget.
    - `accuracy`: what is asked of problems whose values are not exact; the upper end of the
      interval of a value is its energy.
    - `sharding`: a `NamedSharding` of the leading axis, to spread the particles over devices. They
      are evaluated and summed in 64 blocks, so that the number of devices decides nothing.

    Source: Pinnau, Totzeck, Tse, Martin (*M3AS* 27, 2017); Carrillo, Jin, Li, Zhu (*ESAIM: COCV*
    27, 2021); memory: Riedl (arXiv 2211.12184).

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
    penalty: float = 1.0
    feasible_within: float = 1e-6
    tol: float = 1e-4
    patience: int = 50
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not isinstance(self.particles, int) or self.particles < 2:
            raise ValueError(f"particles is {self.particles!r}: give an integer of at least 2.")
        if self.batch is not None and not 0 < self.batch <= self.particles:
            raise ValueError(f"batch is {self.batch!r}: give 1 to {self.particles} particles.")
        for leaf in jax.tree.leaves(self.ensemble):
            if is_concrete(leaf) and not np.isfinite(np.asarray(leaf)).all():
                raise ValueError("ensemble has entries that are not finite: leave them out.")
        for name in ("drift", "dt", "penalty", "tol"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not value > 0:
                raise ValueError(f"{name} is {value}: it must be positive.")

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
        box = Box.of(start)
        key, first = jax.random.split(start.key)
        bounded = jnp.all(jnp.isfinite(box.lower) & jnp.isfinite(box.upper))
        x = self._ensemble(start, x0, box, bounded, first)
        x = distributed(jax.vmap(self._feasible(box))(x), self.sharding)
        inf, false = jnp.array(jnp.inf, x.dtype), jnp.array(False)
        memory = None
        if self.memory is not None:
            nothing = jnp.zeros(self.particles, x.dtype)
            memory = (x, nothing + jnp.inf, nothing)
        return CBOState(
            x=x,
            noise=self.noise.init(x),
            memory=memory,
            consensus=x0,
            best=inf,
            best_violation=jnp.zeros_like(inf),
            best_x=x0,
            effective=jnp.array(self.particles, x.dtype),
            width=inf,
            penalty=jnp.asarray(self.penalty, x.dtype),
            scale=jnp.std(replicated(x, self.sharding), axis=0),
            step=jnp.array(0, jnp.int32),
            agreeing=jnp.array(0, jnp.int32),
            key=key,
            box=box,
            probing=false,
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
            leaves, like = jax.tree.leaves(self.ensemble), jax.tree.leaves(start.x)
            same = jax.tree.structure(self.ensemble) == jax.tree.structure(start.x)
            wanted = [(n, *leaf.shape) for leaf in like]
            if not same or [jnp.shape(leaf) for leaf in leaves] != wanted:
                shapes = [jnp.shape(leaf) for leaf in leaves]
                raise ValueError(
                    f"ensemble has the shapes {shapes}: it must be a pytree like x0 with a leading "
                    f"axis of particles={n}, so of shapes {wanted}."
                )
            x = jax.vmap(lambda point: ravel_pytree(point)[0])(self.ensemble).astype(x0.dtype)
            outside = jnp.any((x < box.lower[None]) | (x > box.upper[None]))
            return eqx.error_if(x, outside, "ensemble has particles outside the bounds.")
        uniform, gaussian = jax.random.split(key)
        sigma = ravel_pytree(self._spread_like(start.x))[0]
        around = x0[None] + sigma[None] * normal(gaussian, jnp.zeros((n, d), x0.dtype))
        low, high = (jnp.where(bounded, side, 0) for side in (box.lower, box.upper))
        within = low[None] + (high - low)[None] * jax.random.uniform(uniform, (n, d), x0.dtype)
        x = jnp.where(bounded, within, around)
        # The start point is one of them.
        return x.at[0].set(x0)

    def _spread_like(self, x: PyTree) -> PyTree:
        if jax.tree.structure(self.spread) == jax.tree.structure(x):
            given = self.spread
        else:
            given = jax.tree.map(lambda leaf: self.spread, x)
        full = lambda s, leaf: jnp.broadcast_to(jnp.asarray(s, leaf.dtype), leaf.shape)  # noqa: E731
        return jax.tree.map(full, given, x)

    def _feasible(self, box: Box) -> Callable[[Array], Array]:
        """A flat point put back where it may be."""

        def put(x: Array) -> Array:
            x = box.clip(x)
            if self.retract is None:
                return x
            return ravel_pytree(self.retract(box.unravel(x)))[0]

        return put

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
        count = min(x.shape[0], MOST_PROBES)
        none = jnp.zeros((count, x.shape[1]), x.dtype)
        probes = when(state.probing, lambda none, now: self._probes(state, none, now), none)
        probes = jnp.pad(probes, ((0, x.shape[0] - count), (0, 0)))
        first = state.probing & (jnp.arange(x.shape[0]) < count)
        return jnp.where(first[:, None], probes, x)

    def _probes(self, state: CBOState, like: Positions, now: Array) -> Positions:
        """Points around the best one, at distances that halve from the spread of the start."""
        count = like.shape[0]
        key = self._key(state, 2 + now)
        exponent = -PROBE_LADDER * jnp.arange(count) / count
        length = (2.0**exponent).astype(like.dtype)[:, None]
        points = state.best_x[None] + length * state.scale[None] * normal(key, like)
        return jax.vmap(self._feasible(state.box))(points)

    def ask(self, state: CBOState) -> Query:
        over = self.sharding if self.batch is None else None
        x = distributed(self._asked(state), over)
        each = lambda t: jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])  # noqa: E731
        return Query(
            jax.vmap(state.box.unravel)(x),
            Accuracy(each(self.accuracy.state), each(self.accuracy.adjoint)),
            mask=jnp.ones(x.shape[0], bool),
            derivatives=0 if self.gradient is None else 1,
            sharding=over,
        )

    # -- tell -------------------------------------------------------------------------------------

    def tell(self, state: CBOState, query: Query, evaluation: Evaluation) -> CBOState:
        dtype = state.x.dtype
        ok = (evaluation.status != PointStatus.failed) & query.mask
        # Of a value that is an interval the upper end counts.
        value = (evaluation.value + evaluation.value_error).astype(dtype)
        ok = ok & ~jnp.isnan(value) & (value < jnp.inf)
        violation = jnp.zeros_like(value)
        if evaluation.violation is not None:
            violation = jnp.where(ok, evaluation.violation.astype(dtype), jnp.inf)
        energy = jnp.where(ok, value + state.penalty * violation, jnp.inf)
        energy = replicated(energy, self.sharding)
        x = jax.vmap(lambda point: ravel_pytree(point)[0])(query.x)
        lowest = jnp.argmin(energy)
        lower = energy[lowest] < state.best
        hard = violation[lowest] > self.feasible_within
        gradient = None
        if self.gradient is not None:
            gradient = jax.vmap(lambda g: ravel_pytree(g)[0])(evaluation.gradient)
        now = dataclasses.replace(
            state,
            best=jnp.where(lower, energy[lowest], state.best),
            best_violation=jnp.where(lower, violation[lowest], state.best_violation),
            best_x=jnp.where(lower, x[lowest], state.best_x),
        )
        moved = self._moved(now, x, energy, violation, ok, gradient)
        # After probes the particles go on from there when one of them was lower, else all is over.
        # Selecting is cheaper than a conditional, which would copy all particles.
        held = jnp.where(lower, self._placed(state, x), state.x)
        probed = dataclasses.replace(
            now,
            x=distributed(held, self.sharding),
            step=state.step + 1,
            agreeing=jnp.zeros_like(state.agreeing),
            probing=jnp.zeros_like(state.probing),
            done=~lower,
            status=Status.where(lower, Status.running, Status.consensus),
        )
        new = select(state.probing, probed, moved)
        new = self._dearer(new, jnp.where(hard & ok[lowest], 0.5 * state.penalty, 0))
        lost = jnp.sum(ok) == 0
        return dataclasses.replace(
            new,
            done=new.done | lost,
            status=Status.where(lost, Status.all_failed, new.status),
        )

    def _dearer(self, state: CBOState, more: Array) -> CBOState:
        """With a larger penalty, for what is remembered too."""
        memory = state.memory
        if memory is not None:
            x, energy, violation = memory
            memory = (x, energy + more * violation, violation)
        return dataclasses.replace(
            state,
            memory=memory,
            best=state.best + more * state.best_violation,
            penalty=state.penalty + more,
        )

    def _placed(self, state: CBOState, x: Float[Array, "m d"]) -> Positions:
        """All particles, with those that were evaluated at x."""
        return x if self.batch is None else state.x.at[self._members(state)].set(x)

    def _moved(
        self,
        state: CBOState,
        x: Positions,
        energy: Array,
        violation: Array,
        ok: Array,
        gradient: Positions | None,
    ) -> CBOState:
        """One step of the particles."""
        over = self.sharding if self.batch is None else None
        noise_key, copy_key = self._key(state, 0), self._key(state, 1)
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
        placed = when(jnp.sum(ok) < ok.size, lambda x, now: _replaced(x, ok, copy_key, now), x)
        u = placed - m
        drifted = (1 - self.drift * self.dt) * u
        if memory is not None and self.memory is not None:
            pull = jnp.where(ok[:, None], placed - anchor, 0)
            drifted = drifted - self.memory * self.dt * pull
        if gradient is not None and self.gradient is not None:
            usable = ok[:, None] & jnp.isfinite(gradient)
            drifted = drifted - self.gradient * self.dt * jnp.where(usable, gradient, 0)
        noise_memory = self.noise.update(state.noise, placed, agreed)
        noise = self.noise(noise_key, u, drifted, state.scale, agreed.weights, noise_memory, over)
        moved = jax.vmap(self._feasible(state.box))(m + noise)
        close = (jnp.abs(u) <= self.tol * (1 + jnp.abs(m))) & ok[:, None]
        agree = jnp.min(total(close.astype(x.dtype), over)) >= 0.5 * x.shape[0]
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
            width=jnp.max(total(jnp.abs(u), over)) / x.shape[0],
            step=state.step + 1,
            agreeing=agreeing,
            probing=agreeing > self.patience,
        )

    def terminate(self, state: CBOState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: CBOState) -> dict[str, Array]:
        return {"iteration": state.step, "spread": state.width, "effective": state.effective}


def _replaced(x: Positions, ok: Bool[Array, " n"], key: PRNGKeyArray, now: Array) -> Positions:
    """Failed particles put where others are, drawn at random."""
    rank = jnp.cumsum(ok & now)
    drawn = jnp.floor(rank[-1] * uniform(fold_in(key, now.astype(jnp.int32)), x.shape[0])) + 1
    donor = jnp.searchsorted(rank, drawn.astype(rank.dtype))
    return jnp.where(ok[:, None], x, x[donor])


class Sphere(eqx.Module):
    """The nearest point with norm `radius`, for `retract` (all leaves of x together)."""

    radius: float = 1.0

    def __call__(self, x: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(x)
        norm = jnp.linalg.norm(flat)
        first = jnp.zeros_like(flat).at[0].set(1)
        return unravel(
            self.radius * jnp.where(norm > 0, flat / jnp.where(norm > 0, norm, 1), first)
        )


class Stiefel(eqx.Module):
    """The nearest matrix with orthonormal columns (polar factor), for `retract`; x is one matrix of
    shape (n, p) with n >= p."""

    def __call__(self, x: Float[Array, "n p"]) -> Float[Array, "n p"]:
        u, _, vt = jnp.linalg.svd(x, full_matrices=False)
        return u @ vt
