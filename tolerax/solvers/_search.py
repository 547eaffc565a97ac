"""A search along descent directions on values and gradients that are known only to within bounds,
asking for accuracy only where a test needs it. Where directions come from is left to subclasses."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.solvers._common import (
    Box,
    Geometry,
    check_accuracy,
    failure,
    resolution,
    select,
    success,
)
from tolerax.solvers._search_state import (
    AHEAD,
    BEHIND,
    INCUMBENT,
    TRIAL,
    Answer,
    Direction,
    Incumbent,
    SearchState,
    Todo,
)
from tolerax.status import PointStatus, Status, is_failed
from tolerax.validation import check_options


class IntervalSearch(Solver):
    """The search that [`InexactLineSearch`][] and [`InexactNewton`][] have in common.

    A trial is accepted when the *intervals* of the values show a sufficient decrease; a direction
    `-h` is used when the bound on the gradient error shows that it descends. When a test cannot be
    decided, state and adjoint accuracy are tightened by the term that dominates; otherwise the next
    request follows from how the last bounds depended on the achieved errors.
    """

    rtol: ArrayLike = 1e-8
    atol: ArrayLike = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(0.1, 0.1))
    share: float = 0.1
    adaptive: bool = eqx.field(static=True, default=True)
    eta: float = 0.1
    sufficient_decrease: float = 1e-4
    first_step: float = 1.0
    max_trials: int = 30
    max_refinements: int = 12

    def __check_init__(self):
        check_options(
            self,
            below_1="eta share sufficient_decrease",
            at_least_0="rtol atol",
            positive="first_step",
            at_least_1="max_trials max_refinements",
        )
        check_accuracy(self.accuracy)

    @property
    def honours_bounds(self) -> bool:
        return True

    # -- what subclasses give ---------------------------------------------------------------------

    derivatives = 1
    # Whether to ask for accuracy before turning to steepest descent.
    patient = False

    @abc.abstractmethod
    def _new_model(self, x: Float[Array, " n"]) -> PyTree:
        """The model that knows nothing."""

    @abc.abstractmethod
    def _direction(
        self, state: SearchState, z: Float[Array, " n"], free: Array, answer: Answer
    ) -> Direction:
        """A direction on the free variables, from the gradient z there."""

    @abc.abstractmethod
    def _learned(
        self, state: SearchState, told: Incumbent, keep: Array, gain: Array, geometry: Geometry
    ) -> PyTree:
        """The model after a step was accepted; `keep`: its curvature can be told from errors."""

    @abc.abstractmethod
    def _forgotten(self, state: SearchState) -> tuple[PyTree, Bool[Array, ""]]:
        """The model after a search that failed, and whether there was something to forget."""

    @abc.abstractmethod
    def _last(self, model: PyTree) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """A recent step and the change of the gradient along it."""

    # -- the four methods -------------------------------------------------------------------------

    def init(self, start: Start) -> SearchState:
        x, _ = ravel_pytree(start.x)
        dtype = x.dtype
        zero, inf = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype)
        request = _cast(self.accuracy, dtype)
        nothing = Accuracy(zero, zero)
        now = Incumbent(x, inf, inf, jnp.zeros_like(x), inf, nothing, nothing, start.carry)
        count = jnp.array(0, jnp.int32)
        false = jnp.array(False)
        return SearchState(
            now=now,
            model=self._new_model(x),
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

    def ask(self, state: SearchState) -> Query:
        now, h = state.now, self._difference_step(state)
        offset = jnp.stack([0 * h, state.step, h, -h])[state.mode]
        x = jnp.where(state.mode == INCUMBENT, now.x, self._path(state, offset))
        carry = select(state.mode == TRIAL, state.trial_carry, now.carry)
        # A trial above the incumbent will be rejected: no need to finish it.
        cutoff = jnp.where(state.mode == TRIAL, now.f + now.f_error, jnp.inf)
        # Nor to pay many times what any point on the way here has cost.
        most = jnp.iinfo(state.dearest.dtype).max
        effort = jnp.where(state.mode == TRIAL, 3 * jnp.maximum(state.dearest, 40), most)
        return Query(
            state.box.unravel(x),
            state.request,
            carry,
            derivatives=self.derivatives,
            cutoff=cutoff,
            effort=effort,
        )

    def tell(self, state: SearchState, query: Query, evaluation: Evaluation) -> SearchState:
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
        # An infinite bound asks for more accuracy; one that is not a number bounds nothing.
        failed = is_failed(status) | jnp.isnan(told.z_error + told.f_error)
        converged = (
            Status.converged if evaluation.provenance.certified else Status.converged_estimated
        )
        geometry = Geometry(evaluation.metric, state.box)
        answer = Answer(failed, status, converged, geometry, evaluation.hessian)
        spent = evaluation.work.units.astype(state.dearest.dtype)
        usual = (state.mode == INCUMBENT) | (status == PointStatus.ok)
        dearest = jnp.where(usual, jnp.maximum(state.dearest, spent), state.dearest)
        state = _replace(state, dearest=jnp.minimum(dearest, 10**8))
        nothing = Todo(jnp.array(False), jnp.array(False), jnp.zeros((), x.dtype))
        told_state, todo = jax.lax.switch(
            state.mode,
            [
                lambda: self._tell_incumbent(state, told, answer),
                lambda: self._tell_trial(state, told, answer),
                lambda: (_replace(state, ahead=told.f, mode=_mode(BEHIND)), nothing),
                lambda: (self._tell_behind(state, told, geometry), nothing),
            ],
        )
        state = jax.lax.cond(
            todo.plan & ~told_state.done,
            lambda: self._plan(told_state, answer),
            lambda: told_state,
        )
        hopeless = todo.hopeless | (state.refinements >= self.max_refinements)
        hopeless = hopeless & todo.plan & (state.mode == INCUMBENT) & ~state.done
        state = _finish_if(state, hopeless, failure(status))
        further = (todo.stretch > 0) & (state.mode == TRIAL) & ~state.done
        state = _replace(
            state,
            p=jnp.where(further, told_state.p, state.p),
            step=jnp.where(further, todo.stretch * told_state.step, state.step),
        )
        contradicted = (status == PointStatus.contradicted) & ~state.done
        return _replace(
            state,
            done=state.done | contradicted,
            status=Status.where(contradicted, Status.contradicted, state.status),
        )

    def terminate(self, state: SearchState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: SearchState, evaluation: Evaluation) -> Bool[Array, ""]:
        z, _ = ravel_pytree(evaluation.gradient)
        geometry = Geometry(evaluation.metric, state.box)
        # The tolerance is met up to the error of the two evaluations.
        measure = geometry.stationarity(state.now.x, z) + evaluation.gradient_error
        return measure <= 2 * self._tolerance(state)

    def record(self, state: SearchState) -> dict[str, Array]:
        return {"iteration": state.iterations, "step_size": state.step}

    # -- geometry ---------------------------------------------------------------------------------

    def _path(self, state: SearchState, step: Array) -> Float[Array, " n"]:
        return state.box.clip(state.now.x + step * state.p)

    def _tolerance(self, state: SearchState) -> Float[Array, ""]:
        return jnp.asarray(self.atol + self.rtol * state.scale)

    def _difference_step(self, state: SearchState) -> Float[Array, ""]:
        """Step along p for central differences of values: cube root of the value precision."""
        eps = jnp.finfo(state.p.dtype).eps
        p_norm = jnp.linalg.norm(state.p)
        length = eps ** (1 / 3) * jnp.maximum(1.0, jnp.linalg.norm(state.now.x))
        return length / jnp.where(p_norm > 0, p_norm, 1)

    # -- answers at the incumbent -----------------------------------------------------------------

    def _tell_incumbent(
        self, state: SearchState, told: Incumbent, answer: Answer
    ) -> tuple[SearchState, Todo]:
        failed = answer.failed
        first = state.scale == 0
        no_better = (
            ~first
            & (told.z_error > 0.9 * state.now.z_error)
            & (told.f_error > 0.9 * state.now.f_error)
        )
        stuck = no_better & (state.refinements > 1)
        # The first gradient may be all error: closer looks at the start replace it.
        at_start = first | ((state.iterations == 0) & ~failed)
        scale = jnp.where(at_start, answer.geometry.stationarity(told.x, told.z), state.scale)
        scale = jnp.where(scale == 0, jnp.finfo(told.x.dtype).tiny, scale)
        f_scale = jnp.where(first, jnp.abs(told.f), state.f_scale)
        keep = failed & ~first
        now = select(keep, state.now, told)
        state = _replace(state, now=now, scale=scale, f_scale=f_scale)
        # Before anything is concluded from the gradient of a failed point, which may well be 0.
        state = _finish_if(state, failed & first, Status.non_finite_start)
        if not self.adaptive:
            boundless = told.z_error + told.f_error == jnp.inf
            state = _finish_if(state, boundless & ~failed, failure(answer.status))
        return state, Todo(jnp.array(True), stuck, jnp.zeros((), told.x.dtype))

    def _plan(self, state: SearchState, answer: Answer) -> SearchState:
        """Converged, a direction to search along, or a tighter look at the incumbent."""
        now, geometry = state.now, answer.geometry
        measure = geometry.stationarity(now.x, now.z)
        # Finite derivatives without a finite norm: the metric is not positive definite.
        state = _finish_if(state, ~jnp.isfinite(measure), Status.inner_failed)
        tolerance = self._tolerance(state)
        holds = measure + now.z_error <= tolerance
        floor = resolution(now.x, *self._last(state.model), geometry.dual)
        state = _finish_if(state, holds, success(answer.converged, tolerance, floor))

        free = ~state.box.blocked(now.x, now.z)
        z = jnp.where(free, now.z, 0)
        g = jnp.where(free, geometry.riesz(z), 0)
        to = self._direction(state, z, free, answer)
        hz = to.h
        zhz, z_error = jnp.dot(z, hz), now.z_error
        usable = (zhz > 0) & jnp.all(jnp.isfinite(hz))
        length = geometry.norm(hz)
        certain = usable & (z_error * length <= (1 - self.eta) * zhz)
        steepest = z_error <= (1 - self.eta) * measure
        # Steepest descent is tried before paying for accuracy: its test is the easiest to pass.
        curvature = jnp.where(usable & (measure > 0), length / measure, 1.0)
        p = -jnp.where(certain, hz, curvature * g)
        fresh = to.fresh | ~usable
        # The first step is as long as the gradient but at most 1, or one part in a hundred of x.
        length = jnp.maximum(jnp.minimum(measure, 1.0), 0.01 * geometry.norm(now.x))
        length = length / jnp.where(measure > 0, measure, 1.0) * self.first_step
        p = jnp.where(fresh, -g, p)
        step = jnp.where(fresh, length, 1.0).astype(now.x.dtype)
        slope = step * jnp.dot(z, p)
        descends = certain | (steepest & (fresh if self.patient else jnp.array(True)))
        # The error of the incumbent's value has to be paid by the decrease of the step.
        worth = jnp.minimum(-0.5 * slope, 10 * state.decrease)
        clear = now.f_error <= 0.25 * worth
        target = jnp.where(
            measure + z_error > 2 * tolerance,
            jnp.maximum(self.share * to.expected, 0.5 * tolerance),
            jnp.maximum(tolerance - measure, 0.1 * tolerance),
        )
        # A gradient of 0 is all error: by how much to tighten it does not say.
        target = jnp.where(measure > 0, target, 0.1 * z_error)
        nearly = (measure <= 0.9 * tolerance) & (z_error > 0)
        search = descends & clear & ~nearly & to.ready if self.adaptive else jnp.array(True)
        # Without a direction there is no decrease yet that the value has to resolve.
        request = self._request(state, target, jnp.where(descends, 0.1 * worth, jnp.inf))
        halved = jax.tree.map(lambda t: jnp.where(t > 0, 0.5 * t, jnp.inf), now.achieved)
        refined = jax.tree.map(jnp.minimum, request, halved)
        request = select(search, request, refined)
        # What was claimed is looked at again as closely as before.
        request = select(state.done, state.request, request)
        return _replace(
            state,
            model=to.model,
            p=p,
            step=step,
            trials=jnp.zeros_like(state.trials),
            mode=jnp.where(search, TRIAL, INCUMBENT).astype(jnp.int32),
            request=request if self.adaptive else state.request,
            trial_carry=now.carry,
            refinements=jnp.where(search, 0, state.refinements + 1),
        )

    def _request(self, state: SearchState, z_target: Array, f_target: Array) -> Accuracy:
        """Tolerances that should give these errors, from how the last bounds depended on what was
        achieved: linear for the gradient, quadratic for the corrected value."""
        now = state.now
        tiny = jnp.finfo(now.x.dtype).tiny
        by_value = jnp.sqrt(f_target / jnp.maximum(now.f_error, tiny))

        def scaled(achieved: Array, part: Array, requested: Array) -> Array:
            by_gradient = 0.5 * z_target / jnp.maximum(part, tiny)
            tolerance = achieved * jnp.minimum(by_gradient, by_value)
            # Infinite bounds do not say by how much.
            blind = ~jnp.isfinite(achieved + part + now.f_error)
            tolerance = jnp.where(blind, 0.1 * jnp.minimum(achieved, requested), tolerance)
            return jnp.where(achieved > 0, tolerance, requested)

        return Accuracy(
            scaled(now.achieved.state, now.parts.state, state.request.state),
            scaled(now.achieved.adjoint, now.parts.adjoint, state.request.adjoint),
        )

    # -- answers at a trial -----------------------------------------------------------------------

    def _tell_trial(
        self, state: SearchState, told: Incumbent, answer: Answer
    ) -> tuple[SearchState, Todo]:
        failed, geometry = answer.failed, answer.geometry
        zero, no, yes = jnp.zeros((), told.x.dtype), jnp.array(False), jnp.array(True)
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
        # Nothing is known that far away: a shorter step is cheaper than more accuracy.
        unsure = unsure & (errors < jnp.inf)
        # A gradient without a bound teaches nothing: a closer look before the point is taken.
        unsure = unsure | (accept & (told.z_error == jnp.inf) & (state.refinements < 4))
        accept = accept & ~unsure
        unsure = unsure if self.adaptive else jnp.array(False)

        length = geometry.norm(moved)

        def accepted() -> tuple[SearchState, Todo]:
            y = told.z - now.z
            sy = jnp.dot(moved, y)
            noise = (now.z_error + told.z_error) * length
            keep = sy > jnp.maximum(noise, 1e-10 * length * geometry.dual(y))
            model = self._learned(state, told, keep, gain, geometry)
            # Without curvature the step was too short: the secant of the slopes says by how much,
            # and the next one goes further the same way.
            longer = ~keep & (slope_there < 0.5 * slope) & (not self.patient)
            most = jnp.where(state.iterations == 0, 2, 4)
            stretch = jnp.clip(slope / (slope - slope_there), 2, most)
            stretch = jnp.where(slope_there < slope, most, stretch)
            new = _replace(
                state,
                now=told,
                model=model,
                iterations=state.iterations + 1,
                decrease=jnp.maximum(gain, 0),
                refinements=jnp.zeros_like(state.refinements),
                restarted=no,
            )
            return new, Todo(yes, no, jnp.where(longer, stretch, 0).astype(zero.dtype))

        def refined() -> tuple[SearchState, Todo]:
            incumbent = now.f_error > told.f_error
            factor = jnp.sqrt(jnp.clip(0.25 * gain / errors, 0.01, 0.5))
            base = select(incumbent, now.achieved, told.achieved)
            request = jax.tree.map(jnp.minimum, base * factor, state.request)
            mode = jnp.where(incumbent, INCUMBENT, TRIAL).astype(jnp.int32)
            again = _replace(
                state,
                mode=mode,
                request=request,
                trial_carry=told.carry,
                refinements=state.refinements + 1,
            )
            return again, Todo(no, no, zero)

        def rejected() -> tuple[SearchState, Todo]:
            # Cubic through both values and slopes where the slope there can be trusted.
            f_change = told.f - now.f
            quadratic = -slope / (2 * (f_change - slope))
            d1 = slope + slope_there - 3 * f_change
            root = jnp.sqrt(jnp.maximum(d1 * d1 - slope * slope_there, 0))
            cubic = 1 - (slope_there + root - d1) / (slope_there - slope + 2 * root)
            trusted = told.z_error * length <= 0.1 * jnp.abs(slope_there)
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
            # Begin again along steepest descent; if that was it, compare the gradient with values.
            model, had = self._forgotten(shorter)
            again = over & had & ~state.restarted
            restarted = _replace(shorter, model=model, restarted=yes)
            check = _replace(shorter, mode=_mode(AHEAD))
            ended = select(again, restarted, check)
            return select(over, ended, shorter), Todo(again, no, zero)

        branch = jnp.where(accept, 0, jnp.where(unsure, 1, 2))
        return jax.lax.switch(branch, [accepted, refined, rejected])

    def _tell_behind(self, state: SearchState, told: Incumbent, geometry: Geometry) -> SearchState:
        """Compare the difference of two values with the gradient, then end."""
        h = self._difference_step(state)
        moved = self._path(state, h) - self._path(state, -h)
        predicted = jnp.dot(state.now.z, moved)
        seen = state.ahead - told.f
        eps = jnp.finfo(told.x.dtype).eps
        # Rounding of values and what central differences of this step leave out.
        size = jnp.maximum(state.f_scale, jnp.maximum(jnp.abs(state.ahead), jnp.abs(told.f)))
        noise = 0.1 * eps ** (2 / 3) * size + 2 * told.f_error
        allowed = 0.5 * jnp.abs(predicted) + noise + state.now.z_error * geometry.norm(moved)
        wrong = jnp.isfinite(seen) & (jnp.abs(seen - predicted) > allowed)
        return _finish_if(
            state,
            jnp.array(True),
            Status.where(wrong, Status.gradient_inconsistent, Status.stalled),
        )


def _replace(state: SearchState, **changes: Any) -> SearchState:
    return dataclasses.replace(state, **changes)


def _finish_if(state: SearchState, condition: Array, status: Any) -> SearchState:
    ends = condition & ~state.done
    return _replace(state, done=state.done | ends, status=Status.where(ends, status, state.status))


def _cast(accuracy: Accuracy, dtype: Any) -> Accuracy:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), accuracy)


def _mode(mode: int) -> Int[Array, ""]:
    return jnp.array(mode, jnp.int32)
