"""Consensus-based sampling: an ensemble that becomes a sample of `exp(-f)`, or finds its mode."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.particles import normal
from tolerax.solvers._common import Box, select
from tolerax.solvers._population import (
    LEAST_PROBES,
    Ensemble,
    any_finite,
    batch_query,
    boltzmann,
    check_count,
    check_spread,
    energies,
    first_ensemble,
    flat,
    probed,
    probes,
    scale_like,
    tempered,
)
from tolerax.status import Status
from tolerax.validation import check_options

Positions = Float[Array, "n d"]
FIRST_BLOCK = 8  # steps


class Block(eqx.Module):
    """Means and variances of the ensemble, averaged over a number of steps."""

    mean: Float[Array, " d"]
    variance: Float[Array, " d"]
    count: Int[Array, ""]

    @classmethod
    def empty(cls, like: Array) -> "Block":
        """No steps yet."""
        return cls(jnp.zeros_like(like), jnp.zeros_like(like), jnp.array(0, jnp.int32))

    def add(self, mean: Array, variance: Array) -> "Block":
        """With one more step."""
        count = self.count + 1
        average = lambda old, new: old + (new - old) / count.astype(old.dtype)  # noqa: E731
        return Block(average(self.mean, mean), average(self.variance, variance), count)

    def agrees(self, other: "Block", tol: Any) -> Bool[Array, ""]:
        """Whether the means are within `tol` standard deviations, the variances within `tol`."""
        v = self.variance
        close = jnp.abs(self.mean - other.mean) <= tol * jnp.sqrt(v)
        alike = jnp.abs(v - other.variance) <= tol * v
        return jnp.all(close & alike & (v > 0)) & (other.count > 0)


class SamplingState(Ensemble):
    """The ensemble, the inverse temperature of its weights, the best point."""

    x: Positions
    beta: Float[Array, ""]
    effective: Float[Array, ""]
    best: Float[Array, ""]
    best_x: Float[Array, " d"]
    width: Float[Array, ""]
    scale: Float[Array, " d"]
    now: Block
    before: Block
    length: Int[Array, ""]
    step: Int[Array, ""]
    key: PRNGKeyArray
    box: Box
    probes: Int[Array, ""]
    done: Bool[Array, ""]
    status: Any


class ConsensusSampling(Solver):
    """Consensus-based sampling: an ensemble that becomes a sample of the density `exp(-f)`, by
    values of f at N points a step.

        x <- m + a (x - m) + sqrt((1 - a^2) (1 + beta)) C^(1/2) xi

    with mean m and covariance C of the particles under the weights `exp(-beta f)`. Of a Gaussian
    density the ensemble becomes an exact sample (up to its size); of another one the normal
    approximation near its mode, which is not the density. The run ends when averages over many
    steps stand still: means and variances of the ensemble over the last block of steps and over the
    block before, half as long, agree to `settled` standard deviations, and to this share of the
    variances. `Status.sampled` says so; ensemble, mean and covariance are in
    `solution.state.solver_state`, and `solution.x` is the best point, not the mean.

    With `mode="optimize"` the factor `1 + beta` is left out: the ensemble contracts, to a minimum
    of f where it does so slowly enough. The run ends when its standard deviation is at most
    `tol * (1 + |m|)` in every coordinate and probes around the best point find no lower value (if
    one does, the ensemble continues from the probes). `CBO(noise=Covariance())` is the same with a
    covariance that remembers, and finds more.

    - `particles`: N, more than d.
    - `beta`: the inverse temperature; by default it is set in every step such that the effective
      sample size `(sum w)^2 / sum w^2` is a `share` of the particles.
    - `keep`: a, how much of a particle is kept, between 0 and 1.
    - `spread`: the ensemble starts normal about x0 with this standard deviation (a pytree like x,
      or a number). - `ensemble`: the particles to start from instead, with a leading axis of N.
    - `accuracy`: what is asked of problems whose values are not exact; the upper end of the
      interval of a value is f.

    Points that fail have weight 0 and are drawn anew. Points outside the bounds are moved to the
    nearest one inside, so bounds that matter distort the sample: change variables instead.

    Source: Carrillo, Hoffmann, Stuart, Vaes (*Studies in Applied Mathematics* 148, 2022); the
    covariance is divided by `1 - sum w^2`, which removes its bias, when sampling.

    >>> import jax.numpy as jnp, tolerax
    >>> problem = tolerax.Objective(lambda x: jnp.sum((x - 3) ** 2 / jnp.array([2.0, 0.02])))
    >>> solver = tolerax.solvers.ConsensusSampling(particles=500)
    >>> solution = tolerax.solve(problem, solver, jnp.zeros(2))
    >>> state = solution.state.solver_state  # the variances of the density are 1 and 0.01
    >>> bool(solution.success), bool(jnp.all(jnp.abs(state.mean - 3) < jnp.array([0.3, 0.03])))
    (True, True)
    """

    particles: int = eqx.field(static=True, default=200)
    mode: Literal["sample", "optimize"] = eqx.field(static=True, default="sample")
    beta: float | None = None
    share: float = 0.5
    keep: float = 0.0
    spread: PyTree = 1.0
    ensemble: PyTree = None
    settled: float = 0.1
    tol: float = 1e-4
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))

    def __check_init__(self):
        check_count(self, "particles")
        check_spread(self.spread)
        check_options(self, positive="settled tol beta")
        check_options(self, below_1="share")
        if self.mode not in ("sample", "optimize"):
            raise ValueError(f'mode is {self.mode!r}: use "sample" or "optimize".')
        if not isinstance(self.keep, jax.Array) and not 0 <= self.keep < 1:
            raise ValueError(f"keep is {self.keep}: it must be at least 0 and less than 1.")

    @property
    def honours_bounds(self) -> bool:
        return True

    def init(self, start: Start) -> SamplingState:
        x0, _ = ravel_pytree(start.x)
        box = Box.of(start)
        key, first = jax.random.split(start.key)
        x = first_ensemble(start, box, self.particles, self.spread, self.ensemble, first)
        inf, false = jnp.array(jnp.inf, x.dtype), jnp.array(False)
        return SamplingState(
            x=jax.vmap(box.clip)(x),
            beta=jnp.zeros((), x.dtype),
            effective=jnp.array(self.particles, x.dtype),
            best=inf,
            best_x=x0,
            width=inf,
            scale=scale_like(self.spread, start.x),
            now=Block.empty(x0),
            before=Block.empty(x0),
            length=jnp.array(FIRST_BLOCK, jnp.int32),
            step=jnp.array(0, jnp.int32),
            key=key,
            box=box,
            probes=jnp.array(0, jnp.int32),
            done=false,
            status=Status.running,
        )

    def ask(self, state: SamplingState) -> Query:
        return batch_query(state.x, state.box, self.accuracy)

    def tell(self, state: SamplingState, query: Query, evaluation: Evaluation) -> SamplingState:
        x, energy = flat(query.x), energies(query, evaluation, state.x.dtype)
        lowest = jnp.argmin(energy)
        lower = energy[lowest] < state.best
        now = dataclasses.replace(
            state,
            best=jnp.where(lower, energy[lowest], state.best),
            best_x=jnp.where(lower, x[lowest], state.best_x),
            step=state.step + 1,
        )
        moved = self._moved(now, x, energy)
        # Enough probes that found nothing lower end the run; others are the next ensemble.
        probing = (state.probes > 0) & ~lower
        ended = probing & (state.probes >= LEAST_PROBES)
        new, success = (
            (self._averaged(moved), Status.sampled)
            if self.mode == "sample"
            else (self._probing(moved, probing), probed(state.best_x, state.scale))
        )
        lost = ~any_finite(energy)
        finished = ended | new.done
        status = Status.where(finished, success, Status.running)
        return dataclasses.replace(
            new,
            x=jnp.where(ended | lost, x, new.x),
            done=finished | lost,
            status=Status.where(lost, Status.all_failed, status),
        )

    def _moved(self, state: SamplingState, x: Positions, energy: Array) -> SamplingState:
        """The next ensemble."""
        if self.beta is None:
            beta, w = tempered(energy, self.share)
        else:
            beta, w = jnp.asarray(self.beta, x.dtype), boltzmann(energy, self.beta)
        squares = jnp.sum(w * w)
        m = w @ x
        u = x - m[None]
        inflated = jnp.ones((), x.dtype)
        if self.mode == "sample":
            inflated = (1 + beta) / jnp.maximum(1 - squares, jnp.finfo(x.dtype).eps)
        # C = F' F with F triangular: no square root of a matrix of rank below d is needed.
        factor = jnp.linalg.qr(jnp.sqrt(w * inflated)[:, None] * u, mode="r")
        like = jnp.zeros((x.shape[0], factor.shape[0]), x.dtype)
        drawn = normal(jax.random.fold_in(state.key, state.step), like) @ factor
        ok = (energy < jnp.inf)[:, None]
        a = jnp.where(ok, jnp.asarray(self.keep, x.dtype), 0)
        new = jax.vmap(state.box.clip)(m[None] + a * u + jnp.sqrt(1 - a * a) * drawn)
        return dataclasses.replace(
            state,
            x=new,
            beta=beta,
            effective=1 / jnp.where(squares > 0, squares, 1),
            width=jnp.max(jnp.std(new, axis=0)),
        )

    def _averaged(self, state: SamplingState) -> SamplingState:
        """The averages over blocks of steps, each twice as long as the one before."""
        block = state.now.add(jnp.mean(state.x, axis=0), jnp.var(state.x, axis=0))
        full = block.count >= state.length
        return dataclasses.replace(
            state,
            now=select(full, Block.empty(block.mean), block),
            before=select(full, block, state.before),
            length=jnp.where(full, 2 * state.length, state.length),
            done=full & block.agrees(state.before, self.settled),
        )

    def _probing(self, state: SamplingState, again: Array) -> SamplingState:
        """Probes as the next ensemble where the particles agree, or have to probe again."""
        m = jnp.mean(state.x, axis=0)
        agree = again | jnp.all(jnp.std(state.x, axis=0) <= self.tol * (1 + jnp.abs(m)))
        before = jnp.where(again, state.probes, 0)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        around = probes(key, state.best_x, state.scale, self.particles, before)
        around = jax.vmap(state.box.clip)(around)
        return dataclasses.replace(
            state,
            x=jnp.where(agree, around, state.x),
            probes=jnp.where(agree, before + self.particles, 0),
        )

    def terminate(self, state: SamplingState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: SamplingState) -> dict[str, Array]:
        return {
            "iteration": state.step,
            "spread": state.width,
            "effective": state.effective,
            "beta": state.beta,
        }
