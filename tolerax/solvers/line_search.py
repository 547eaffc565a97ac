"""Inexact line search: quasi-Newton steps on values and gradients that are known only to within
bounds, asking for accuracy only where a test needs it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.lbfgs import Pairs, add_pair, inverse_product, no_pairs
from tolerax.solvers._common import Box, failure, resolution, select, success
from tolerax.status import PointStatus, Status, is_failed

INCUMBENT, TRIAL, AHEAD, BEHIND = range(4)


class Incumbent(eqx.Module):
    """The current point and what is known there."""

    x: Float[Array, " n"]
    f: Float[Array, ""]
    f_error: Float[Array, ""]
    z: Float[Array, " n"]
    z_error: Float[Array, ""]
    parts: Accuracy
    achieved: Accuracy
    carry: PyTree


class LineSearchState(eqx.Module):
    """What evolves: the incumbent, the quasi-Newton memory, the search along `p`, the request."""

    now: Incumbent
    pairs: Pairs
    p: Float[Array, " n"]
    step: Float[Array, ""]
    trials: Int[Array, ""]
    restarted: Bool[Array, ""]
    mode: Int[Array, ""]
    request: Accuracy
    trial_carry: PyTree
    ahead: Float[Array, ""]
    refinements: Int[Array, ""]
    iterations: Int[Array, ""]
    dearest: Int[Array, ""]
    scale: Float[Array, ""]
    f_scale: Float[Array, ""]
    decrease: Float[Array, ""]
    box: Box
    done: Bool[Array, ""]
    status: Any


class InexactLineSearch(Solver):
    """Line search with L-BFGS directions (or steepest descent) for inexact values and gradients.

    A trial is accepted when the *intervals* of the values show a sufficient decrease; a direction
    `d = -H z` is used when the bound on the gradient error shows that it descends,
    `gradient_error * |H z| <= (1 - eta) z'Hz`. When a test cannot be decided, state and adjoint
    accuracy are tightened by the term that dominates; otherwise the next request follows from how
    the last bounds depended on the achieved errors. On plain functions (error 0) this is an L-BFGS
    method with a backtracking, extrapolating line search.

    - `rtol`, `atol`: converged when `|projected gradient| + gradient_error <=
      atol + rtol * |projected gradient at x0|` (Euclidean norms).
    - `memory`: L-BFGS pairs; 0 gives steepest descent.
    - `accuracy`: the first request.
    - `share`: the gradient error asked for, relative to the gradient.
    - `adaptive`: `False` keeps `accuracy` throughout (for comparisons).
    - `first_step`: factor on the length of the first trial step, `max(min(|z|, 1), |x0| / 100)`.

    Source: the interval test and the descent test are those of MAID (Salehi, Mukherjee, Roberts,
    Ehrhardt, arXiv 2308.10098); directions, corrected values and requests are our own.

    >>> import jax.numpy as jnp, tolerax
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solver = tolerax.InexactLineSearch()
    >>> tolerax.solve(tolerax.Objective(rosenbrock), solver, jnp.array([-1.2, 1.0])).x.round(5)
    Array([1., 1.], dtype=float64)
    """

    rtol: float = 1e-8
    atol: float = 1e-6
    memory: int = eqx.field(static=True, default=10)
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(0.1, 0.1))
    share: float = 0.1
    adaptive: bool = eqx.field(static=True, default=True)
    eta: float = 0.1
    sufficient_decrease: float = 1e-4
    first_step: float = 1.0
    max_trials: int = 30
    max_refinements: int = 12

    def __check_init__(self):
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory}: give 0 (steepest descent) or more.")
        for name in ("eta", "share", "sufficient_decrease"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not 0 < value < 1:
                raise ValueError(f"{name} is {value}: it must lie between 0 and 1.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not value >= 0:
                raise ValueError(f"{name} is {value}: it must not be negative.")

    @property
    def honours_bounds(self) -> bool:
        return True

    # -- the four methods -------------------------------------------------------------------------

    def init(self, start: Start) -> LineSearchState:
        x, _ = ravel_pytree(start.x)
        dtype = x.dtype
        zero, inf = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype)
        request = _cast(self.accuracy, dtype)
        nothing = Accuracy(zero, zero)
        now = Incumbent(x, inf, inf, jnp.zeros_like(x), inf, nothing, nothing, start.carry)
        count = jnp.array(0, jnp.int32)
        false = jnp.array(False)
        return LineSearchState(
            now=now,
            pairs=no_pairs(max(self.memory, 1), x),
            p=jnp.zeros_like(x),
            step=zero,
            trials=count,
            restarted=false,
            mode=jnp.array(INCUMBENT, jnp.int32),
            request=request,
            trial_carry=start.carry,
            ahead=zero,
            refinements=count,
            iterations=count,
            dearest=count,
            scale=zero,
            f_scale=zero,
            decrease=inf,
            box=Box.of(start),
            done=false,
            status=Status.running,
        )

    def ask(self, state: LineSearchState) -> Query:
        now, h = state.now, self._difference_step(state)
        offset = jnp.stack([0 * h, state.step, h, -h])[state.mode]
        x = jnp.where(state.mode == INCUMBENT, now.x, self._path(state, offset))
        carry = select(state.mode == TRIAL, state.trial_carry, now.carry)
        # A trial above the incumbent will be rejected: no need to finish it.
        cutoff = jnp.where(state.mode == TRIAL, now.f + now.f_error, jnp.inf)
        # Nor to pay many times what any point on the way here has cost.
        most = jnp.iinfo(state.dearest.dtype).max
        effort = jnp.where(state.mode == TRIAL, 5 * jnp.maximum(state.dearest, 40), most)
        return Query(state.box.unravel(x), state.request, carry, cutoff=cutoff, effort=effort)

    def tell(self, state: LineSearchState, query: Query, evaluation: Evaluation) -> LineSearchState:
        x, _ = ravel_pytree(query.x)
        z, _ = ravel_pytree(evaluation.gradient)
        told = Incumbent(
            x,
            evaluation.value.astype(x.dtype),
            evaluation.value_error.astype(x.dtype),
            z,
            evaluation.gradient_error.astype(x.dtype),
            _cast(evaluation.gradient_error_parts, x.dtype),
            _cast(evaluation.achieved, x.dtype),
            evaluation.carry,
        )
        status = evaluation.status
        # A bound that is not a number bounds nothing.
        failed = is_failed(status) | ~jnp.isfinite(told.z_error + told.f_error)
        converged = (
            Status.converged if evaluation.provenance.certified else Status.converged_estimated
        )
        outcome = (failed, status, converged)
        spent = evaluation.work.units.astype(state.dearest.dtype)
        usual = (state.mode == INCUMBENT) | (status == PointStatus.ok)
        dearest = jnp.where(usual, jnp.maximum(state.dearest, spent), state.dearest)
        state = _replace(state, dearest=jnp.minimum(dearest, 10**8))
        state = jax.lax.switch(
            state.mode,
            [
                lambda: self._tell_incumbent(state, told, outcome),
                lambda: self._tell_trial(state, told, outcome),
                lambda: _replace(state, ahead=told.f, mode=_mode(BEHIND)),
                lambda: self._tell_behind(state, told),
            ],
        )
        contradicted = (status == PointStatus.contradicted) & ~state.done
        return _replace(
            state,
            done=state.done | contradicted,
            status=Status.where(contradicted, Status.contradicted, state.status),
        )

    def terminate(self, state: LineSearchState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: LineSearchState, evaluation: Evaluation) -> Bool[Array, ""]:
        z, _ = ravel_pytree(evaluation.gradient)
        # The tolerance is met up to the error of the two evaluations.
        measure = state.box.stationarity(state.now.x, z) + evaluation.gradient_error
        return measure <= 2 * self._tolerance(state)

    def record(self, state: LineSearchState) -> dict[str, Array]:
        return {"iteration": state.iterations, "step_size": state.step}

    # -- geometry ---------------------------------------------------------------------------------

    def _path(self, state: LineSearchState, step: Array) -> Float[Array, " n"]:
        return state.box.clip(state.now.x + step * state.p)

    def _tolerance(self, state: LineSearchState) -> Float[Array, ""]:
        return self.atol + self.rtol * state.scale

    def _difference_step(self, state: LineSearchState) -> Float[Array, ""]:
        """Step along p for central differences of values: cube root of the value precision."""
        eps = jnp.finfo(state.p.dtype).eps
        p_norm = jnp.linalg.norm(state.p)
        length = eps ** (1 / 3) * jnp.maximum(1.0, jnp.linalg.norm(state.now.x))
        return length / jnp.where(p_norm > 0, p_norm, 1)

    # -- answers at the incumbent -----------------------------------------------------------------

    def _tell_incumbent(
        self, state: LineSearchState, told: Incumbent, outcome: tuple
    ) -> LineSearchState:
        failed, point_status, converged = outcome
        first = state.scale == 0
        no_better = (
            ~first
            & (told.z_error > 0.9 * state.now.z_error)
            & (told.f_error > 0.9 * state.now.f_error)
        )
        stuck = no_better & (state.refinements > 1)
        # The first gradient may be all error: closer looks at the start replace it.
        at_start = first | ((state.iterations == 0) & ~failed)
        scale = jnp.where(at_start, state.box.stationarity(told.x, told.z), state.scale)
        scale = jnp.where(scale == 0, jnp.finfo(told.x.dtype).tiny, scale)
        f_scale = jnp.where(first, jnp.abs(told.f), state.f_scale)
        keep = failed & ~first
        now = select(keep, state.now, told)
        state = _replace(state, now=now, scale=scale, f_scale=f_scale)
        # Before anything is concluded from the gradient of a failed point, which may well be 0.
        state = self._plan(_finish_if(state, failed & first, Status.non_finite_start), converged)
        hopeless = (stuck | (state.refinements >= self.max_refinements)) & (state.mode == INCUMBENT)
        cause = failure(point_status)
        return _finish_if(state, hopeless & ~state.done, cause)

    def _plan(self, state: LineSearchState, converged: Any) -> LineSearchState:
        """Converged, a direction to search along, or a tighter look at the incumbent."""
        now = state.now
        measure = state.box.stationarity(now.x, now.z)
        tolerance = self._tolerance(state)
        holds = measure + now.z_error <= tolerance
        newest = (state.pairs.count - 1) % state.pairs.s.shape[0]
        floor = resolution(now.x, state.pairs.s[newest], state.pairs.y[newest])
        state = _finish_if(state, holds, success(converged, tolerance, floor))

        free = ~state.box.blocked(now.x, now.z)
        z = jnp.where(free, now.z, 0)
        hz = inverse_product(state.pairs, z, free) if self.memory else z
        zhz, z_error = jnp.dot(z, hz), now.z_error
        usable = (zhz > 0) & jnp.all(jnp.isfinite(hz))
        certain = usable & (z_error * jnp.linalg.norm(hz) <= (1 - self.eta) * zhz)
        steepest = z_error <= (1 - self.eta) * measure
        # Steepest descent is tried before paying for accuracy: its test is the easiest to pass.
        curvature = jnp.where(usable & (measure > 0), jnp.linalg.norm(hz) / measure, 1.0)
        p = -jnp.where(certain, hz, curvature * z)
        fresh = (state.pairs.count == 0) | ~usable
        # The first step is as long as the gradient but at most 1, or one part in a hundred of x.
        length = jnp.maximum(jnp.minimum(measure, 1.0), 0.01 * jnp.linalg.norm(now.x))
        length = length / jnp.where(measure > 0, measure, 1.0) * self.first_step
        p = jnp.where(fresh, -z, p)
        step = jnp.where(fresh, length, 1.0).astype(now.x.dtype)
        slope = step * jnp.dot(z, p)
        descends = certain | steepest
        # The error of the incumbent's value has to be paid by the decrease of the step.
        worth = jnp.minimum(-0.5 * slope, 10 * state.decrease)
        clear = now.f_error <= 0.25 * worth
        target = jnp.where(
            measure + z_error > 2 * tolerance,
            jnp.maximum(self.share * measure, 0.5 * tolerance),
            jnp.maximum(tolerance - measure, 0.1 * tolerance),
        )
        nearly = (measure <= 0.9 * tolerance) & (z_error > 0)
        search = descends & clear & ~nearly if self.adaptive else jnp.array(True)
        # Without a direction there is no decrease yet that the value has to resolve.
        request = self._request(state, target, jnp.where(descends, 0.1 * worth, jnp.inf))
        halved = jax.tree.map(lambda t: jnp.where(t > 0, 0.5 * t, jnp.inf), now.achieved)
        refined = jax.tree.map(jnp.minimum, request, halved)
        request = select(search, request, refined)
        return _replace(
            state,
            p=p,
            step=step,
            trials=jnp.zeros_like(state.trials),
            mode=jnp.where(search, TRIAL, INCUMBENT).astype(jnp.int32),
            request=request if self.adaptive else state.request,
            trial_carry=now.carry,
            refinements=jnp.where(search, 0, state.refinements + 1),
        )

    def _request(self, state: LineSearchState, z_target: Array, f_target: Array) -> Accuracy:
        """Tolerances that should give these errors, from how the last bounds depended on what was
        achieved: linear for the gradient, quadratic for the corrected value."""
        now = state.now
        tiny = jnp.finfo(now.x.dtype).tiny
        by_value = jnp.sqrt(f_target / jnp.maximum(now.f_error, tiny))

        def scaled(achieved: Array, part: Array, requested: Array) -> Array:
            by_gradient = 0.5 * z_target / jnp.maximum(part, tiny)
            tolerance = achieved * jnp.minimum(by_gradient, by_value)
            return jnp.where(achieved > 0, tolerance, requested)

        return Accuracy(
            scaled(now.achieved.state, now.parts.state, state.request.state),
            scaled(now.achieved.adjoint, now.parts.adjoint, state.request.adjoint),
        )

    # -- answers at a trial -----------------------------------------------------------------------

    def _tell_trial(
        self, state: LineSearchState, told: Incumbent, outcome: tuple
    ) -> LineSearchState:
        failed, _, converged = outcome
        now, eps = state.now, jnp.finfo(told.x.dtype).eps
        moved = told.x - now.x
        slope = jnp.dot(now.z, moved)
        needed = -self.sufficient_decrease * slope
        rounding = 4 * eps * jnp.maximum(jnp.abs(now.f), jnp.abs(told.f))
        gain = now.f - told.f - needed
        errors = now.f_error + told.f_error
        slope_there = jnp.dot(told.z, moved)
        # Where values cannot be told apart, slopes decide (approximate Wolfe conditions, Hager and
        # Zhang 2005): the gradient still has digits when the value has none left.
        flat = (jnp.abs(now.f - told.f) <= rounding) & (errors <= rounding)
        flat_ok = flat & (jnp.abs(slope_there) <= 0.9 * jnp.abs(slope))
        accept = ~failed & ((gain >= errors) | flat_ok) & (slope < 0)
        unsure = ~failed & ~accept & (gain > rounding) & (state.refinements < 4)
        unsure = unsure if self.adaptive else jnp.array(False)
        # A value that falls to -inf, or far below anything seen, has no minimum to find.
        limit = -(1 + state.f_scale) * eps**-1.5
        state = _finish_if(state, (told.f <= limit) & ~failed, Status.unbounded)

        def accepted() -> LineSearchState:
            y = told.z - now.z
            sy = jnp.dot(moved, y)
            noise = (now.z_error + told.z_error) * jnp.linalg.norm(moved)
            keep = sy > jnp.maximum(noise, 1e-10 * jnp.linalg.norm(moved) * jnp.linalg.norm(y))
            pairs = select(keep, add_pair(state.pairs, moved, y), state.pairs)
            # Without curvature the step was too short: the secant of the slopes says by how much.
            longer = ~keep & (slope_there < 0.9 * slope)
            stretch = jnp.clip(slope / (slope - slope_there), 2, 10)
            stretch = jnp.where(slope_there < slope, 10, stretch)
            new = _replace(
                state,
                now=told,
                pairs=pairs,
                iterations=state.iterations + 1,
                decrease=jnp.maximum(gain, 0),
                refinements=jnp.zeros_like(state.refinements),
                restarted=jnp.array(False),
            )
            planned = self._plan(new, converged)
            # Without curvature along the step the next one goes further the same way.
            further = longer & (planned.mode == TRIAL) & ~planned.done
            return _replace(
                planned,
                p=jnp.where(further, state.p, planned.p),
                step=jnp.where(further, stretch * state.step, planned.step),
            )

        def refined() -> LineSearchState:
            incumbent = now.f_error > told.f_error
            factor = jnp.sqrt(jnp.clip(0.25 * gain / errors, 0.01, 0.5))
            base = select(incumbent, now.achieved, told.achieved)
            request = jax.tree.map(jnp.minimum, base * factor, state.request)
            mode = jnp.where(incumbent, INCUMBENT, TRIAL).astype(jnp.int32)
            return _replace(
                state,
                mode=mode,
                request=request,
                trial_carry=told.carry,
                refinements=state.refinements + 1,
            )

        def rejected() -> LineSearchState:
            # Cubic through both values and slopes where the slope there can be trusted.
            f_change = told.f - now.f
            quadratic = -slope / (2 * (f_change - slope))
            d1 = slope + slope_there - 3 * f_change
            root = jnp.sqrt(jnp.maximum(d1 * d1 - slope * slope_there, 0))
            cubic = 1 - (slope_there + root - d1) / (slope_there - slope + 2 * root)
            trusted = told.z_error * jnp.linalg.norm(moved) <= 0.1 * jnp.abs(slope_there)
            # As in More and Thuente (1994): the cubic, or half way to a nearer quadratic.
            blend = jnp.where(cubic < quadratic, cubic, 0.5 * (cubic + quadratic))
            guess = jnp.where(trusted & jnp.isfinite(cubic), blend, quadratic)
            factor = jnp.clip(jnp.where(jnp.isfinite(guess), guess, 0.5), 0.01, 0.6)
            factor = jnp.where(failed & ~jnp.isfinite(f_change), 0.25, factor)
            step = state.step * factor
            negligible = jnp.all(self._path(state, step) == now.x)
            over = (state.trials + 1 >= self.max_trials) | negligible
            shorter = _replace(
                state,
                step=step,
                trials=state.trials + 1,
                refinements=jnp.zeros_like(state.refinements),
                trial_carry=now.carry,
            )
            return jax.lax.cond(
                over, lambda: self._search_failed(shorter, converged), lambda: shorter
            )

        branch = jnp.where(accept, 0, jnp.where(unsure, 1, 2))
        return jax.lax.switch(branch, [accepted, refined, rejected])

    def _search_failed(self, state: LineSearchState, converged: Any) -> LineSearchState:
        """Begin again along steepest descent; if that was it, compare the gradient with values."""
        again = _replace(
            state,
            pairs=no_pairs(max(self.memory, 1), state.now.x),
            restarted=jnp.array(True),
        )
        again = self._plan(again, converged)
        check = _replace(state, mode=_mode(AHEAD))
        had_memory = (state.pairs.count > 0) & ~state.restarted
        return select(had_memory, again, check)

    def _tell_behind(self, state: LineSearchState, told: Incumbent) -> LineSearchState:
        """Compare the difference of two values with the gradient, then end."""
        h = self._difference_step(state)
        moved = self._path(state, h) - self._path(state, -h)
        predicted = jnp.dot(state.now.z, moved)
        seen = state.ahead - told.f
        eps = jnp.finfo(told.x.dtype).eps
        # Rounding of values and what central differences of this step leave out.
        size = jnp.maximum(state.f_scale, jnp.maximum(jnp.abs(state.ahead), jnp.abs(told.f)))
        noise = 0.1 * eps ** (2 / 3) * size + 2 * told.f_error
        allowed = 0.5 * jnp.abs(predicted) + noise + state.now.z_error * jnp.linalg.norm(moved)
        wrong = jnp.isfinite(seen) & (jnp.abs(seen - predicted) > allowed)
        return _finish_if(
            state,
            jnp.array(True),
            Status.where(wrong, Status.gradient_inconsistent, Status.stalled),
        )


def _replace(state: LineSearchState, **changes: Any) -> LineSearchState:
    return dataclasses.replace(state, **changes)


def _finish_if(state: LineSearchState, condition: Array, status: Any) -> LineSearchState:
    ends = condition & ~state.done
    return _replace(state, done=state.done | ends, status=Status.where(ends, status, state.status))


def _cast(accuracy: Accuracy, dtype: Any) -> Accuracy:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), accuracy)


def _mode(mode: int) -> Int[Array, ""]:
    return jnp.array(mode, jnp.int32)
