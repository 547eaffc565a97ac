"""The parts of consensus-based optimization: how particles agree, how they are moved by noise.

A consensus turns positions x of shape (N, d) and energies of shape (N,) (infinite where a particle
failed or takes no part) into the point m that the particles drift to. A noise turns the distances
to it into a random displacement.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tolerax.inner.noise import fold_in, normal, uniform
from tolerax.inner.particles import (
    everywhere,
    replicated,
    times,
    weighted_mean,
    weighted_squares,
)
from tolerax.solvers._population import (
    check_count,
)
from tolerax.validation import check_options

Positions = Float[Array, "n d"]
Energies = Float[Array, " n"]
Scalar = Float[Array, ""]


class Agreement(eqx.Module):
    """The consensus of a step: `point` of shape (1, d), or (N, d) where each particle has its own;
    `effective` is the effective sample size `(sum w)^2 / sum w^2` of the `weights`, of shape (N,),
    which sum to 1."""

    point: Array
    effective: Scalar
    weights: Energies


class Consensus(eqx.Module):
    """How particles agree on a point."""

    #: Whether it says nothing where points have no `violation`.
    of_violations: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        """The consensus of particles at x; `over` is the sharding of the particles or `None`."""


def _shifted(energy: Energies) -> Energies:
    """Energies above the lowest one: 0 where it is attained, infinite where there is none."""
    least = jnp.min(energy)
    return jnp.where(
        jnp.isfinite(energy), energy - jnp.where(jnp.isfinite(least), least, 0), jnp.inf
    )


def _height(shifted: Energies) -> Scalar:
    """The median of the finite ones, 1 where that is 0: a mean would follow a few far particles."""
    finite = jnp.where(shifted < jnp.inf, shifted, jnp.nan)
    middle = jnp.nanquantile(finite, 0.5, method="lower")  # no sum that overflows
    return jnp.where(middle > 0, middle, 1)


def _boltzmann(alpha: Array, shifted: Energies) -> Energies:
    """`exp(-alpha E)`: 0 for infinite E, 1 for E = 0, whatever alpha is."""
    return jnp.where(shifted > 0, jnp.exp(-alpha * shifted), jnp.ones_like(shifted)) * (
        shifted < jnp.inf
    )


def _agree(x: Positions, w: Energies, over: Any) -> Agreement:
    w = replicated(w, over)
    s, squares = jnp.sum(w), jnp.sum(w * w)
    return Agreement(weighted_mean(w, x, over)[None], s * s / squares, w / s)


class HardMinimum(Consensus):
    """The best particle: the limit of all weights for alpha to infinity (of several, the first).

    Source: the discrete scheme with alpha = inf of arXiv 2403.03430; it needs no scale of the
    energies.
    """

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del violation, step, over
        best = jnp.argmin(energy)
        alone = (jnp.arange(x.shape[0]) == best).astype(x.dtype)
        return Agreement(x[best][None], jnp.ones((), x.dtype), alone)


class SoftConsensus(Consensus):
    """Weights `exp(-alpha (E - min E))` (Pinnau, Totzeck, Tse, Martin, *M3AS* 27, 2017).

    - `alpha`: the inverse temperature; multiplied by `growth` in every step, so that the consensus
      hardens late in the run.
    - `standardized`: energies are divided by their median height above the lowest one, which makes
      alpha independent of their unit.
    """

    alpha: float = 30.0
    growth: float = 1.0
    standardized: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_options(self, positive="alpha growth")

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del violation
        shifted = _shifted(energy)
        alpha = jnp.asarray(self.alpha, x.dtype)
        if not (isinstance(self.growth, float | int) and self.growth == 1):
            alpha = alpha * jnp.asarray(self.growth, x.dtype) ** step
        if self.standardized:
            alpha = alpha / _height(shifted)
        return _agree(x, _boltzmann(alpha, shifted), over)


class RankWeights(Consensus):
    """Weights `log(N/2 + 1/2) - log(rank)` of the better half, 0 for the rest: only the order of
    the energies counts. (Hansen, *The CMA evolution strategy: a tutorial*, arXiv 1604.00772.)
    """

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del violation, step
        count = jnp.maximum(jnp.sum(energy < jnp.inf), 1)
        rank = (jnp.argsort(jnp.argsort(energy)) + 1).astype(x.dtype)
        w = jnp.maximum(jnp.log(0.5 * count + 0.5) - jnp.log(rank), 0)
        # A single particle has rank 1 and the whole weight.
        w = jnp.where((rank == 1) & (count == 1), 1, w) * (energy < jnp.inf)
        return _agree(x, w, over)


class EffectiveSampleSize(Consensus):
    """Weights `exp(-alpha (E - min E))` with alpha such that the effective sample size
    `(sum w)^2 / sum w^2` is a fixed share of the particles.

    - `share`: between 0 and 1. - `bisections`: halvings of the interval for log alpha.
    """

    share: float = 0.4
    bisections: int = eqx.field(static=True, default=30)

    def __check_init__(self):
        check_options(self, below_1="share")
        check_count(self, "bisections", 1)

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del violation, step
        shifted = _shifted(energy)
        count = jnp.maximum(jnp.sum(shifted < jnp.inf), 1)
        unit = _height(shifted)

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            w = _boltzmann(jnp.exp(middle) / unit, shifted)
            flat = jnp.sum(w) ** 2 / jnp.sum(w * w) > self.share * count
            return jnp.where(flat, middle, low), jnp.where(flat, high, middle)

        ends = (jnp.full((), -12.0, energy.dtype), jnp.full((), 24.0, energy.dtype))
        low, high = jax.lax.fori_loop(0, self.bisections, halve, ends)
        return _agree(x, _boltzmann(jnp.exp(0.5 * (low + high)) / unit, shifted), over)


class Polarized(Consensus):
    """Each particle has a consensus of its own, of those near it: several minimizers are found
    (Bungert, Roith, Wacker, *Polarized consensus-based dynamics*, arXiv 2211.05238).

    `m_i = sum_j k(x_i, x_j) w_j x_j / sum_j k(x_i, x_j) w_j` with the Gaussian kernel
    `exp(-|x_i - x_j|^2 / (2 kappa^2))`; costs O(N^2 d), on every device.
    """

    kappa: float = 1.0
    alpha: float = 30.0

    def __check_init__(self):
        check_options(self, positive="kappa alpha")

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del violation, step

        def agreed(x: Array, energy: Array) -> Agreement:
            shifted = _shifted(energy)
            log_w = -self.alpha * shifted / _height(shifted)
            squares = jnp.sum(x * x, axis=1)
            apart = jnp.maximum(squares[:, None] + squares[None, :] - 2 * x @ x.T, 0)
            k = jax.nn.softmax(log_w[None, :] - apart / (2 * self.kappa**2), axis=1)
            return Agreement(k @ x, jnp.mean(1 / jnp.sum(k * k, axis=1)), jnp.mean(k, axis=0))

        return everywhere(agreed, over, x, energy)


class Quantile(Consensus):
    """Of the particles with the lowest `violation` the best: for an upper level over the minimizers
    of a lower one (CB2O: arXiv 2411.13394). The problem answers with the upper value as `value` and
    the lower one as `violation`: give it as a constraint `lower(x) <= 0`, shifted so that its
    minimum is 0. With a minimum above 0 nothing is feasible, and with one below 0 the run finds the
    lowest upper value wherever `lower(x) <= 0`, minimizer or not.

    - `share`: how many are kept (at least one), between 0 and 1. - `alpha`: as in
      [`SoftConsensus`][].
    """

    share: float = 0.1
    alpha: float = 30.0
    of_violations = True

    def __check_init__(self):
        check_options(self, below_1="share")
        check_options(self, positive="alpha")

    def __call__(
        self, x: Positions, energy: Energies, violation: Energies, step: Int[Array, ""], over: Any
    ) -> Agreement:
        del step
        lower = jnp.where(energy < jnp.inf, violation, jnp.inf)
        # Of those that violate alike the ones with the lowest energy.
        rank = jnp.argsort(jnp.lexsort((energy, lower)))
        count = jnp.maximum(jnp.sum(lower < jnp.inf), 1)
        kept = rank < jnp.maximum(jnp.floor(self.share * count), 1)
        shifted = _shifted(jnp.where(kept, energy, jnp.inf))
        return _agree(x, _boltzmann(self.alpha / _height(shifted), shifted), over)


class Noise(eqx.Module):
    """A random displacement whose size follows the distance u to the consensus."""

    #: Whether particles drift as well; without, `drift`, `memory` and `gradient` do nothing.
    drifts: ClassVar[bool] = True

    def init(self, x: Positions) -> Any:
        """What the noise remembers, for particles that start at x."""
        del x
        return None

    def update(self, memory: Any, x: Positions, agreed: Agreement, over: Any = None) -> Any:
        """What the noise remembers once particles at x have agreed."""
        del x, agreed, over
        return memory

    @abc.abstractmethod
    def __call__(
        self,
        key: PRNGKeyArray,
        u: Positions,
        drifted: Positions,
        scale: Float[Array, " d"],
        weights: Energies,
        memory: Any,
        over: Any = None,
    ) -> Positions:
        """Where particles go from `drifted`, where the drift took them; both are relative to the
        consensus. `scale` is the spread of the start in every coordinate, `weights` are those of
        the particles in the consensus, `over` is the sharding of the particles or `None`."""

    @abc.abstractmethod
    def contraction(self, drift: float, d: int) -> float:
        """The mean logarithmic growth of the distance to a fixed consensus in one step, for a drift
        `lambda dt`: where it is not negative, particles do not agree."""


class Anisotropic(Noise):
    """Noise `s u_j xi_j` in every coordinate j, whose strength does not depend on the dimension
    (Carrillo, Jin, Li, Zhu, *ESAIM: COCV* 27, 2021), with `s = sigma sqrt(dt)`.

    - `s`: the strength of a step. Particles agree while `E log|1 - lambda dt + s xi| < 0`, that is
      up to about s = 1.57.
    - `jumps`: the mean number of jumps of a particle in a step, at most 0.01 d, or `None`. A jump
      sets one coordinate to that of the consensus plus `jump_scale` times the spread of the start
      times xi: multiplicative noise alone never brings back a coordinate that all particles agree
      on. (Jump diffusion as of Kalise, Sharma, Tretyakov, *M3AS* 33, 2023, with a width that does
      not vanish.)
    - `floor`: the least |u_j| in the noise, relative to the spread of the start. With a floor above
      `tol` particles never agree, and the run ends with its budget.
    - `truncated`: the largest |u_j| in the noise (arXiv 2310.16610).
    """

    s: float = 0.8
    jumps: float | None = 0.06
    jump_scale: float = 0.4
    floor: float = 0.0
    truncated: float = float("inf")

    def __check_init__(self):
        check_options(self, at_least_0="s jumps jump_scale floor truncated")

    def __call__(
        self,
        key: PRNGKeyArray,
        u: Positions,
        drifted: Positions,
        scale: Float[Array, " d"],
        weights: Energies,
        memory: Any,
        over: Any = None,
    ) -> Positions:
        del memory
        xi = normal(key, u, over)
        width = jnp.clip(jnp.abs(u), self.floor * scale[None], self.truncated)
        n, d = u.shape
        moved = drifted + self.s * width * xi
        if self.jumps is None:
            return moved
        # A jump takes many steps to be forgotten: with more of them particles never agree.
        jumping = uniform(fold_in(key, -1), n) < jnp.minimum(self.jumps, 0.01 * d)
        column = jnp.floor(d * uniform(fold_in(key, -2), n)).astype(jnp.int32)
        column = jnp.where(jumping, column, -1)
        # A particle that is the consensus itself stays.
        here = (jnp.arange(d)[None] == column[:, None]) & (weights < 1)[:, None]
        return jnp.where(here, self.jump_scale * scale[None] * xi, moved)

    def contraction(self, drift: float, d: int) -> float:
        from scipy.special import ndtri

        del d
        xi = ndtri((np.arange(20_000) + 0.5) / 20_000)
        return float(np.mean(np.log(np.abs(1 - drift + float(self.s) * xi))))


class Isotropic(Noise):
    """Noise `s |u| xi` (Pinnau and others 2017), the same in all directions.

    - `s`: the strength of a step. In two and more dimensions this noise drives particles apart, and
      the drift has to make up for it: about `s^2 (d - 2) < 2 lambda dt`.
    - `floor`, `truncated`: as in [`Anisotropic`][], on |u|.
    """

    s: float
    floor: float = 0.0
    truncated: float = float("inf")

    def __check_init__(self):
        check_options(self, at_least_0="s floor truncated")

    def __call__(
        self,
        key: PRNGKeyArray,
        u: Positions,
        drifted: Positions,
        scale: Float[Array, " d"],
        weights: Energies,
        memory: Any,
        over: Any = None,
    ) -> Positions:
        del weights, memory
        length = jnp.linalg.norm(u, axis=1, keepdims=True)
        width = jnp.clip(length, self.floor * jnp.linalg.norm(scale), self.truncated)
        return drifted + self.s * width * normal(key, u, over)

    def contraction(self, drift: float, d: int) -> float:
        rng = np.random.default_rng(0)
        s = float(self.s)
        along = 1 - drift + s * rng.normal(size=50_000)
        across = s**2 * rng.chisquare(d - 1, size=50_000) if d > 1 else 0.0
        return float(0.5 * np.mean(np.log(along**2 + across)))


class Shape(eqx.Module):
    """What [`Covariance`][] remembers: the covariance, its Cholesky factor, the last consensus."""

    covariance: Float[Array, "d d"]
    factor: Float[Array, "d d"]
    point: Float[Array, " d"]


class Covariance(Noise):
    """Noise in the shape of the weighted covariance C of the particles, for landscapes that are
    rotated or badly scaled. Particles are drawn anew, `x = m + L xi` with `L L' = C`, so there is
    no drift: `drift` and `dt` of [`CBO`][] do nothing, `memory` and `gradient` are refused. To be
    used with [`RankWeights`][] and N = 750 particles (few where the problem is easy, more for
    longer runs); a step costs O(N d^2 + d^3).

    In every step `C <- (1 - c) C + c sum_i w_i (x_i - m')(x_i - m')'` with the *previous* consensus
    m', so that C grows along a slope, and `c = min(rate, 2 mu / ((d + 2)^2 + mu))` for the
    effective sample size mu. Then C is inflated by the square of
    `exp(inflation (|L^-1 (m - m')| - sqrt(d / mu)))`: a selection that means nothing would move the
    consensus by about sqrt(d / mu).

    This is consensus-based sampling in its optimizing mode (Carrillo, Hoffmann, Stuart, Vaes,
    *Studies in Applied Mathematics* 148, 2022) with a memory of the covariance, or CMA-ES without
    its paths.

    On several devices runs agree to rounding, not always to the bit.

    - `rate`: the largest c, between 0 and 1. - `inflation`: the exponent; 0 for none.
    """

    drifts = False

    rate: float = 0.4
    inflation: float = 0.5

    def __check_init__(self):
        check_options(self, below_1="rate")
        check_options(self, at_least_0="inflation")

    def init(self, x: Positions) -> Shape:
        d = x.shape[1]
        eye = jnp.eye(d, dtype=x.dtype)
        middle = jnp.mean(x, axis=0)
        variance = jnp.mean((x - middle[None]) ** 2)
        return Shape(variance * eye, jnp.sqrt(variance) * eye, middle)

    def update(self, memory: Shape, x: Positions, agreed: Agreement, over: Any = None) -> Shape:
        if agreed.point.shape[0] > 1:
            raise ValueError("Covariance needs one consensus of all particles, not Polarized.")
        seen = weighted_squares(agreed.weights, x - memory.point[None], over)
        m, mu = agreed.point[0], agreed.effective
        learned = (m, mu, seen, memory.covariance, memory.factor, memory.point)
        return everywhere(self._learned, over, *learned)

    def _learned(
        self, m: Array, mu: Array, seen: Array, covariance: Array, factor: Array, point: Array
    ) -> Shape:
        """What is remembered, with the covariance that was seen about the last consensus."""
        d = m.size
        c = jnp.minimum(self.rate, 2 * mu / ((d + 2) ** 2 + mu))
        covariance = (1 - c) * covariance + c * seen
        step = jax.scipy.linalg.solve_triangular(factor, m - point, lower=True)
        excess = jnp.linalg.norm(step) - jnp.sqrt(d / mu)
        covariance = covariance * jnp.exp(jnp.clip(2 * self.inflation * excess, -1, 1))
        # Rounding must not take the definiteness away.
        eps = jnp.finfo(m.dtype).eps
        least = 500 * eps * jnp.trace(covariance) / d + jnp.finfo(m.dtype).tiny
        covariance = covariance + least * jnp.eye(d, dtype=m.dtype)
        return Shape(covariance, jnp.linalg.cholesky(covariance), m)

    def __call__(
        self,
        key: PRNGKeyArray,
        u: Positions,
        drifted: Positions,
        scale: Float[Array, " d"],
        weights: Energies,
        memory: Shape,
        over: Any = None,
    ) -> Positions:
        del drifted, scale, weights
        return times(normal(key, u, over), memory.factor.T, over)

    def contraction(self, drift: float, d: int) -> float:
        del drift, d
        return -1.0  # the inflation follows the selection
