"""Consensus hopping: a point that hops to the consensus of a cloud drawn around it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Start
from tolerax.inner.particles import distributed, normal
from tolerax.solvers._common import Box
from tolerax.solvers._population import (
    LEAST_PROBES,
    Population,
    any_finite,
    batch_query,
    check_count,
    check_spread,
    energies,
    flat,
    probe_lengths,
    probed,
    probes,
    refuse_bounds,
    scale_like,
)
from tolerax.solvers.consensus import Consensus, RankWeights
from tolerax.status import Status
from tolerax.validation import check_options

Positions = Float[Array, "n d"]


class HoppingState(eqx.Module):
    """What evolves: the point, the `width` of the cloud relative to the spread of the start, and
    the path of the last hops."""

    x: Float[Array, " d"]
    width: Float[Array, ""]
    path: Float[Array, " d"]
    best: Float[Array, ""]
    best_x: Float[Array, " d"]
    effective: Float[Array, ""]
    scale: Float[Array, " d"]
    step: Int[Array, ""]
    key: PRNGKeyArray
    box: Box
    probing: Bool[Array, ""]
    probes: Int[Array, ""]
    done: Bool[Array, ""]
    status: Any


class ConsensusHopping(Population):
    """Consensus hopping: minimization by values at N particles a step, drawn anew each time.

        x_k = consensus of particles drawn from N(x_{k-1}, s^2 I)

    It is [`CBO`][] with so long a time step that particles forget where they were. With weights
    `exp(-alpha E)` and s and `tau = alpha s^2` small it is gradient descent with step tau, up to a
    random error: on `c |x|^2 / 2` the mean hop is the implicit step `x / (1 + c tau)`, for any
    alpha. The point sees the function on the scale s, so it passes over smaller ripples.

    By default ranks weigh the particles and s follows the path of the hops, which makes this an
    evolution strategy: s grows while hops go on in one direction and falls when they undo each
    other. The run ends when s has fallen to `tol * (1 + |x|)` in every coordinate and at least
    64 probes around the best point, at all distances up to `spread`, find no lower value (if one
    does, the point hops there).

    - `particles`: N, of which the first is the point itself: it has no weight, its value is for the
      result.
    - `consensus`: as of [`CBO`][], but not `Polarized` or `Quantile`.
      `SoftConsensus(100.0, standardized=False)` and `shrink=1` make the scheme of the paper.
    - `spread`: s at the start; a pytree like x, or a number.
    - `shrink`: s is multiplied by this in every step; `None` follows the path.
    - `retract`: maps every point back to a set, for instance [`Sphere`][]. Not together with
      bounds.
    - `accuracy`: what is asked of problems whose values are not exact; the upper end of the
      interval of a value is its energy.
    - `sharding`: a `NamedSharding` of the leading axis of the particles, as of [`CBO`][].

    Source: Riedl, Klock, Geldhauser, Fornasier, *Gradient is all you need?* (arXiv 2306.09778);
    the path: cumulative step-size adaptation as in Hansen, *The CMA evolution strategy: a tutorial*
    (arXiv 1604.00772).

    >>> import jax.numpy as jnp, tolerax
    >>> valley = tolerax.Objective(lambda x: x[0] ** 2 + 100 * (x[1] - jnp.sin(x[0])) ** 2)
    >>> solution = tolerax.solve(valley, tolerax.solvers.ConsensusHopping(), jnp.array([3.0, 2.0]))
    >>> bool(jnp.max(jnp.abs(solution.x)) < 1e-2), bool(solution.success)
    (True, True)
    """

    particles: int = eqx.field(static=True, default=100)
    consensus: Consensus = eqx.field(default_factory=RankWeights)
    spread: PyTree = 1.0
    shrink: float | None = None
    retract: Callable[[PyTree], PyTree] | None = None
    tol: float = 1e-4
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count(self, "particles")
        check_spread(self.spread)
        check_options(self, positive="tol shrink")
        if self.consensus.of_violations:
            raise ValueError(
                f"consensus is {self.consensus}, but ConsensusHopping does not look at violations: "
                "use `CBO`."
            )

    @property
    def honours_bounds(self) -> bool:
        return True

    def init(self, start: Start) -> HoppingState:
        x, _ = ravel_pytree(start.x)
        refuse_bounds(start, retract=self.retract)
        box = Box.of(start)
        false = jnp.array(False)
        return HoppingState(
            x=self._feasible(box)(x),
            width=jnp.ones((), x.dtype),
            path=jnp.zeros_like(x),
            best=jnp.array(jnp.inf, x.dtype),
            best_x=x,
            effective=jnp.array(self.particles - 1, x.dtype),
            scale=scale_like(self.spread, start.x),
            step=jnp.array(0, jnp.int32),
            key=start.key,
            box=box,
            probing=false,
            probes=jnp.array(0, jnp.int32),
            done=false,
            status=Status.running,
        )

    def _feasible(self, box: Box) -> Callable[[Array], Array]:
        """A flat point put back where it may be."""
        if self.retract is None:
            return box.clip
        retract = self.retract
        return lambda x: ravel_pytree(retract(box.unravel(x)))[0]

    def _cloud(self, state: HoppingState) -> Positions:
        """The point itself, and particles around it."""
        like = distributed(jnp.zeros((self.particles, state.x.size), state.x.dtype), self.sharding)
        xi = normal(jax.random.fold_in(state.key, state.step), like).at[0].set(0)
        return state.x[None] + state.width * state.scale[None] * xi

    def ask(self, state: HoppingState) -> Query:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        x = jax.lax.cond(
            state.probing,
            lambda: probes(key, state.best_x, state.scale, self.particles, state.probes),
            lambda: self._cloud(state),
        )
        x = distributed(jax.vmap(self._feasible(state.box))(x), self.sharding)
        return batch_query(x, state.box, self.accuracy)

    def tell(self, state: HoppingState, query: Query, evaluation: Evaluation) -> HoppingState:
        x, energy = flat(query.x), energies(query, evaluation, state.x.dtype)
        lowest = jnp.argmin(energy)
        lower = energy[lowest] < state.best
        now = dataclasses.replace(
            state,
            best=jnp.where(lower, energy[lowest], state.best),
            best_x=jnp.where(lower, x[lowest], state.best_x),
            step=state.step + 1,
        )
        new = jax.lax.cond(
            state.probing,
            lambda: self._probed(now, lowest, lower),
            lambda: self._hopped(now, x, energy),
        )
        lost = ~any_finite(energy)
        status = Status.where(lost, Status.all_failed, new.status)
        return dataclasses.replace(new, done=new.done | lost, status=status)

    def _hopped(self, state: HoppingState, x: Positions, energy: Array) -> HoppingState:
        """The point at the consensus of the particles, and the width that follows from the hop."""
        energy = energy.at[0].set(jnp.inf)
        some = any_finite(energy)
        agreed = self.consensus(x, energy, jnp.zeros_like(energy), state.step - 1, self.sharding)
        if agreed.point.shape[0] > 1:
            raise ValueError("ConsensusHopping needs one consensus of all particles: not Polarized")
        new = self._feasible(state.box)(jnp.where(some, agreed.point[0], state.x))
        hop = (new - state.x) / (state.width * state.scale)
        path, factor = self._followed(state, hop, agreed.effective)
        # Where all particles failed they were too far away.
        width = state.width * jnp.where(some, factor, 0.5)
        new_scale = width * state.scale
        return dataclasses.replace(
            state,
            x=new,
            width=width,
            path=jnp.where(some, path, state.path),
            effective=jnp.where(some, agreed.effective, 0.0),
            probing=jnp.all(new_scale <= self.tol * (1 + jnp.abs(new))),
        )

    def _followed(self, state: HoppingState, hop: Array, mu: Array) -> tuple[Array, Array]:
        """The path with one more hop, and the factor for the width.

        If ranks meant nothing, hops would be N(0, I / mu) and the path N(0, I).
        """
        if self.shrink is not None:
            return state.path, jnp.asarray(self.shrink, hop.dtype)
        d = hop.size
        c = (mu + 2) / (d + mu + 5)
        damping = 1 + 2 * jnp.maximum(0, jnp.sqrt(jnp.maximum(mu - 1, 0) / (d + 1)) - 1) + c
        path = (1 - c) * state.path + jnp.sqrt(c * (2 - c) * mu) * hop
        expected = d**0.5 * (1 - 1 / (4 * d) + 1 / (21 * d * d))
        exponent = c / damping * (jnp.linalg.norm(path) / expected - 1)
        return path, jnp.exp(jnp.clip(exponent, -1, 1))

    def _probed(self, state: HoppingState, lowest: Array, lower: Array) -> HoppingState:
        """Go on from the lowest probe, as widely as it was found, else end after enough of them."""
        length = probe_lengths(self.particles, state.x.dtype, state.probes)[lowest]
        made = state.probes + self.particles
        done = ~lower & (made >= LEAST_PROBES)
        return dataclasses.replace(
            state,
            x=jnp.where(lower, state.best_x, state.x),
            width=jnp.where(lower, length, state.width),
            path=jnp.zeros_like(state.path),
            probing=~lower & ~done,
            probes=jnp.where(lower, 0, made),
            done=done,
            status=Status.where(done, probed(state.best_x, state.scale), Status.running),
        )

    def terminate(self, state: HoppingState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: HoppingState) -> dict[str, Array]:
        return {
            "iteration": state.step,
            "spread": jnp.max(state.width * state.scale),
            "effective": state.effective,
        }
