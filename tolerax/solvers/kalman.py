"""Ensemble Kalman inversion: least squares by the covariances of an ensemble."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Start
from tolerax.inner.particles import normal
from tolerax.solvers._common import Box
from tolerax.solvers._population import (
    LEAST_PROBES,
    Ensemble,
    Population,
    any_finite,
    batch_query,
    check_count,
    check_spread,
    energies,
    first_ensemble,
    flat,
    probed,
    probes,
    scale_like,
)
from tolerax.status import Status
from tolerax.validation import check_options

Positions = Float[Array, "n d"]


class KalmanState(Ensemble):
    """The ensemble, the time of the inversion, the best point."""

    x: Positions
    time: Float[Array, ""]
    best: Float[Array, ""]
    best_x: Float[Array, " d"]
    width: Float[Array, ""]
    scale: Float[Array, " d"]
    step: Int[Array, ""]
    key: PRNGKeyArray
    box: Box
    probes: Int[Array, ""]
    done: Bool[Array, ""]
    status: Any


class EnsembleKalmanInversion(Population):
    """Ensemble Kalman inversion: minimizes `|r(x)|^2 / 2` by the residuals at N points a step,
    without derivatives. For problems that answer with residuals: [`LeastSquares`][].

    A step of length h moves mean m and deviations X of the ensemble as a Kalman filter would whose
    data have the covariance I / h, with covariances taken from the ensemble:

        m <- m - C^xr (C^rr + I / h)^-1 mean(r),    X <- (I + h R R' / (N - 1))^-1/2 X

    where the rows of R are the deviations of the residuals. By default steps go on until all
    particles agree to `tol * (1 + |m|)` and probes around the best point, at all distances up to
    `spread`, find no lower value (if one does, the ensemble continues from the probes).

    With `posterior=True` the run ends when the lengths of the steps sum to 1, and the ensemble is a
    sample of the posterior density `exp(-|r|^2 / 2)` times that of the start: residuals are those
    of data with unit noise, the first ensemble (normal about `x0` with the standard deviation
    `spread`, or `ensemble`) is the prior. `Status.sampled` says so, and mean and covariance are in
    `solution.state.solver_state`. They are exact for linear residuals, up to the sampling error of
    the first ensemble; for others they are an approximation whose error does not vanish with N.

    The ensemble stays in the affine span of the first one, so take N > d, or a prior that is
    smooth; with few particles spurious correlations make the spread too small.

    - `particles`: N. - `posterior`: as above.
    - `spread`, `ensemble`: the start, as above.
    - `step`: the length h of a step; by default `max(M / (2 mean Phi), sqrt(M / (2 var Phi)))` with
      `Phi = |r|^2 / 2` and M residuals, which takes short steps while the residuals are large.
    - `tol`: as above. - `accuracy`: what is asked of problems whose values are not exact.

    Points that fail (NaN, infinite, an exception) take no part and are drawn anew from the normal
    distribution of the others. Points outside the bounds are moved to the nearest one inside.

    Source: Iglesias, Law, Stuart (*Inverse Problems* 29, 2013); the transform of the deviations:
    Bishop, Etherton, Majumdar (*Monthly Weather Review* 129, 2001), in the symmetric form; the
    length of a step: Iglesias, Yang (*Inverse Problems* 37, 2021).

    >>> import jax.numpy as jnp, tolerax
    >>> decay = lambda x: x[0] * jnp.exp(-x[1] * jnp.arange(5.0)) - 2 * 0.5 ** jnp.arange(5.0)
    >>> solver = tolerax.solvers.EnsembleKalmanInversion()
    >>> solution = tolerax.solve(tolerax.LeastSquares(decay), solver, jnp.array([1.0, 1.0]))
    >>> bool(jnp.allclose(solution.x, jnp.array([2, jnp.log(2)]), atol=1e-3))
    True
    """

    particles: int = eqx.field(static=True, default=100)
    posterior: bool = eqx.field(static=True, default=False)
    spread: PyTree = 1.0
    ensemble: PyTree = None
    step: float | None = None
    tol: float = 1e-4
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))

    def __check_init__(self):
        check_count(self, "particles")
        check_spread(self.spread)
        check_options(self, positive="tol step")

    @property
    def honours_bounds(self) -> bool:
        return True

    def init(self, start: Start) -> KalmanState:
        x0, _ = ravel_pytree(start.x)
        box = Box.of(start)
        key, first = jax.random.split(start.key)
        x = first_ensemble(start, box, self.particles, self.spread, self.ensemble, first)
        x = jax.vmap(box.clip)(x)
        answer = start.answer(batch_query(x, box, self.accuracy))
        if answer.residuals is None:
            raise TypeError(
                "EnsembleKalmanInversion needs residuals, and this problem answers with values "
                "only: use `tolerax.LeastSquares(residuals)`, or another solver."
            )
        inf, false = jnp.array(jnp.inf, x.dtype), jnp.array(False)
        return KalmanState(
            x=x,
            time=jnp.zeros((), x.dtype),
            best=inf,
            best_x=x0,
            width=inf,
            scale=scale_like(self.spread, start.x),
            step=jnp.array(0, jnp.int32),
            key=key,
            box=box,
            probes=jnp.array(0, jnp.int32),
            done=false,
            status=Status.running,
        )

    def ask(self, state: KalmanState) -> Query:
        return batch_query(state.x, state.box, self.accuracy)

    def tell(self, state: KalmanState, query: Query, evaluation: Evaluation) -> KalmanState:
        x, energy = flat(query.x), energies(query, evaluation, state.x.dtype)
        lowest = jnp.argmin(energy)
        lower = energy[lowest] < state.best
        now = dataclasses.replace(
            state,
            best=jnp.where(lower, energy[lowest], state.best),
            best_x=jnp.where(lower, x[lowest], state.best_x),
            step=state.step + 1,
        )
        # Enough probes that found nothing lower end the run; others are the next ensemble.
        probing = (state.probes > 0) & ~lower
        ended = probing & (state.probes >= LEAST_PROBES)
        moved = self._moved(now, x, flat(evaluation.residuals).astype(x.dtype), energy, probing)
        lost = ~any_finite(energy)
        success = Status.sampled if self.posterior else probed(state.best_x, state.scale)
        late = moved.time >= 1 - 8 * jnp.finfo(x.dtype).eps
        finished = ended | (self.posterior & late)
        status = Status.where(finished, success, Status.running)
        return dataclasses.replace(
            moved,
            x=jnp.where(ended | lost, x, moved.x),
            done=finished | lost,
            status=Status.where(lost, Status.all_failed, status),
        )

    def _moved(
        self, state: KalmanState, x: Positions, r: Array, energy: Array, again: Array
    ) -> KalmanState:
        """One Kalman step of the particles that have residuals; probes in their place where they
        agree, or have to probe `again`."""
        ok = (energy < jnp.inf)[:, None]
        count = jnp.maximum(jnp.sum(ok), 2).astype(x.dtype)
        mean = lambda rows: jnp.sum(jnp.where(ok, rows, 0), axis=0) / count  # noqa: E731
        m, residual = mean(x), mean(r)
        deviations = lambda rows, middle: (  # noqa: E731
            jnp.where(ok, rows - middle[None], 0) / jnp.sqrt(count - 1)
        )
        X, R = deviations(x, m), deviations(r, residual)
        h = self._length(state, energy, r.shape[1])
        # R = V diag(s) W': only the span of the columns of V changes.
        V, s, W = jnp.linalg.svd(R, full_matrices=False)
        m = m - X.T @ (V @ ((W @ residual) * h * s / (1 + h * s * s)))
        X = X + V @ (((1 + h * s * s) ** -0.5 - 1)[:, None] * (V.T @ X))
        key = jax.random.fold_in(state.key, state.step)
        drawn = normal(key, jnp.zeros((x.shape[0], x.shape[0]), x.dtype)) @ X
        new = jnp.where(ok, m[None] + jnp.sqrt(count - 1) * X, m[None] + drawn)
        new = jax.vmap(state.box.clip)(new)
        away = jnp.max(jnp.abs(new - m[None]), axis=0)
        agree = again | (jnp.all(away <= self.tol * (1 + jnp.abs(m))) & (not self.posterior))
        before = jnp.where(again, state.probes, 0)
        key = jax.random.fold_in(key, 1)
        around = probes(key, state.best_x, state.scale, self.particles, before)
        return dataclasses.replace(
            state,
            x=jnp.where(agree, jax.vmap(state.box.clip)(around), new),
            time=state.time + h,
            width=jnp.max(away),
            probes=jnp.where(agree, before + self.particles, 0),
        )

    def _length(self, state: KalmanState, energy: Array, size: int) -> Array:
        """The length of the step; with `posterior` not past time 1."""
        if self.step is None:
            finite = jnp.where(energy < jnp.inf, energy, jnp.nan)
            tiny = jnp.finfo(energy.dtype).tiny
            h = 0.5 * size / jnp.maximum(jnp.nanmean(finite), tiny)
            h = jnp.maximum(h, jnp.sqrt(0.5 * size / jnp.maximum(jnp.nanvar(finite), tiny)))
            # Without end once the particles agree to rounding.
            h = jnp.minimum(h, 1 / jnp.finfo(energy.dtype).eps ** 2)
        else:
            h = jnp.asarray(self.step, energy.dtype)
        return jnp.minimum(h, 1 - state.time) if self.posterior else h

    def terminate(self, state: KalmanState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def record(self, state: KalmanState) -> dict[str, Array]:
        return {"iteration": state.step, "spread": state.width, "time": state.time}
