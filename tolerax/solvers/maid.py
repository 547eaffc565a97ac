"""MAID: the method of adaptive inexact descent, as published."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.solvers._common import Box, check_accuracy, failure, resolution, select, success
from tolerax.status import PointStatus, Status, is_failed
from tolerax.validation import check_options

GRADIENT, TRIAL = 0, 1


class MAIDState(eqx.Module):
    """The point with its value interval and gradient, the search along it, the tolerances.

    `miss`: by how much the last trial missed what the gradient predicted, over its step.
    """

    x: Float[Array, " n"]
    f: Float[Array, ""]
    f_error: Float[Array, ""]
    z: Float[Array, " n"]
    z_error: Float[Array, ""]
    moved: Float[Array, " n"]
    carry: PyTree
    box: Box
    mode: Int[Array, ""]
    request: Accuracy
    step: Float[Array, ""]
    base_step: Float[Array, ""]
    miss: Float[Array, ""]
    tries: Int[Array, ""]
    allowed: Int[Array, ""]
    rounds: Int[Array, ""]
    iterations: Int[Array, ""]
    scale: Float[Array, ""]
    done: Bool[Array, ""]
    status: Any


class MAID(Solver):
    """Steepest descent with backtracking on value intervals and tolerances that halve and grow.

    At each point state and adjoint tolerances are halved together until the gradient error is at
    most `(1 - eta) |z|`; then steps `-step * z` are tried, `step` shrinking by `shrink`, until the
    upper end of the new value lies below the lower end of the old one by `decrease * step * |z|^2`.
    After success step and tolerances grow; after too many trials the tolerances shrink and the
    gradient is computed again, unless the trials show that it is wrong (a test of our own). Trials
    ask for no adjoint.

    For the bounds as published use it with `Bilevel(..., norm="euclidean")`; with the energy norm
    it is the same method on sharper bounds. `InexactLineSearch` is what we recommend.

    - `rtol`, `atol`: as in `InexactLineSearch`; the paper has no such test.
    - `accuracy`: first tolerances (the published default is 0.1 for both).
    - `first_step`: first step (times the gradient).
    - `shrink`, `grow`: factors on the step; `tighten`, `relax`: factors on the tolerances.

    Source: Salehi, Mukherjee, Roberts, Ehrhardt (arXiv 2308.10098); parameter values from the
    authors' public code. The constants behind the bounds are the problem's, not guessed here.

    >>> import jax.numpy as jnp, tolerax
    >>> problem = tolerax.Objective(lambda x: jnp.sum((x - 1.0) ** 2))
    >>> bool(tolerax.solve(problem, tolerax.MAID(), jnp.zeros(2)).success)
    True
    """

    rtol: float = 1e-8
    atol: float = 1e-6
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(0.1, 0.1))
    first_step: float = 0.1
    eta: float = 1e-4
    decrease: float = 1e-8
    shrink: float = 0.5
    grow: float = 10 / 9
    tighten: float = 0.5
    relax: float = 1.05
    first_tries: int = 10
    max_rounds: int = 60

    def __check_init__(self):
        check_options(
            self,
            at_least_0="rtol atol decrease",
            positive="first_step",
            below_1="eta shrink tighten",
            at_least_1="grow relax first_tries max_rounds",
        )
        check_accuracy(self.accuracy)

    @property
    def honours_bounds(self) -> bool:
        return True

    def init(self, start: Start) -> MAIDState:
        x, _ = ravel_pytree(start.x)
        zero, inf = jnp.zeros((), x.dtype), jnp.array(jnp.inf, x.dtype)
        count = jnp.array(0, jnp.int32)
        request = jax.tree.map(lambda t: jnp.asarray(t, x.dtype), self.accuracy)
        step = jnp.asarray(self.first_step, x.dtype)
        return MAIDState(
            x=x,
            f=inf,
            f_error=inf,
            z=jnp.zeros_like(x),
            z_error=inf,
            moved=jnp.zeros_like(x),
            carry=start.carry,
            box=Box.of(start),
            mode=count + GRADIENT,
            request=request,
            step=step,
            base_step=step,
            miss=inf,
            tries=count,
            allowed=jnp.array(self.first_tries, jnp.int32),
            rounds=count,
            iterations=count,
            scale=zero,
            done=jnp.array(False),
            status=Status.running,
        )

    def ask(self, state: MAIDState) -> Query:
        trial = state.mode == TRIAL
        x = jnp.where(trial, state.box.clip(state.x - state.step * state.z), state.x)
        # A trial needs the state only.
        adjoint = jnp.where(trial, jnp.inf, state.request.adjoint)
        return Query(state.box.unravel(x), Accuracy(state.request.state, adjoint), state.carry)

    def tell(self, state: MAIDState, query: Query, evaluation: Evaluation) -> MAIDState:
        failed = is_failed(evaluation.status)
        certified = evaluation.provenance.certified
        converged = Status.converged if certified else Status.converged_estimated
        state = jax.lax.cond(
            state.mode == TRIAL,
            lambda: self._tell_trial(state, query, evaluation, failed),
            lambda: self._tell_gradient(state, evaluation, failed, converged),
        )
        contradicted = (evaluation.status == PointStatus.contradicted) & ~state.done
        return _end(state, contradicted, Status.contradicted)

    def terminate(self, state: MAIDState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: MAIDState, evaluation: Evaluation) -> Bool[Array, ""]:
        z, _ = ravel_pytree(evaluation.gradient)
        measure = state.box.stationarity(state.x, z) + evaluation.gradient_error
        return measure <= 2 * (self.atol + self.rtol * state.scale)

    def record(self, state: MAIDState) -> dict[str, Array]:
        return {"iteration": state.iterations, "step_size": state.step}

    def _tell_gradient(
        self, state: MAIDState, evaluation: Evaluation, failed: Array, converged: Any
    ) -> MAIDState:
        z, _ = ravel_pytree(evaluation.gradient)
        first = state.scale == 0
        measure = state.box.stationarity(state.x, z)
        scale = jnp.where(first, jnp.maximum(measure, jnp.finfo(z.dtype).tiny), state.scale)
        z_error = evaluation.gradient_error
        tolerance = self.atol + self.rtol * scale
        stationary = measure + z_error <= tolerance
        descends = (z_error <= (1 - self.eta) * measure) & ~failed
        # Tighter tolerances that no longer change the bounds end the run.
        rounds = jnp.where(descends, state.rounds, state.rounds + 1)
        new = dataclasses.replace(
            state,
            f=evaluation.value,
            f_error=evaluation.value_error,
            z=jnp.where(descends, z, state.z),
            z_error=z_error,
            carry=evaluation.carry,
            mode=jnp.where(descends, TRIAL, GRADIENT).astype(jnp.int32),
            request=select(descends, state.request, state.request * self.tighten),
            step=state.base_step,
            miss=jnp.full_like(state.miss, jnp.inf),
            tries=jnp.zeros_like(state.tries),
            rounds=rounds,
            scale=scale,
        )
        new = _end(new, failed & first, Status.non_finite_start)
        floor = resolution(state.x, state.moved, z - state.z)
        new = _end(new, stationary & ~failed, success(converged, tolerance, floor))
        return _end(new, rounds > self.max_rounds, failure(evaluation.status))

    def _tell_trial(
        self, state: MAIDState, query: Query, evaluation: Evaluation, failed: Array
    ) -> MAIDState:
        x, _ = ravel_pytree(query.x)
        z_squared = jnp.dot(state.z, state.x - x) / state.step
        upper = evaluation.value + evaluation.value_error
        lower = state.f - state.f_error
        accept = ~failed & (upper - lower <= -self.decrease * state.step * z_squared)
        accept = accept & jnp.any(x != state.x)
        # What curvature adds to a miss falls with the step; one that stays comes from the gradient.
        miss = (evaluation.value - state.f) / state.step + z_squared
        steady = jnp.abs(miss - state.miss) <= 0.25 * jnp.abs(miss)
        eps = jnp.finfo(state.x.dtype).eps
        rounding = 8 * eps * jnp.maximum(jnp.abs(state.f), jnp.abs(evaluation.value))
        errors = (state.f_error + evaluation.value_error + rounding) / state.step
        allowed = 0.5 * z_squared + 2 * errors + state.z_error * jnp.linalg.norm(state.z)
        tries = state.tries + 1
        give_up = ~accept & (tries >= state.allowed)
        shorter = state.step * self.shrink
        request = select(accept, state.request * self.relax, state.request)
        request = select(give_up, state.request * self.tighten, request)
        rounds = jnp.where(accept, 0, state.rounds + give_up)
        new = dataclasses.replace(
            state,
            x=jnp.where(accept, x, state.x),
            moved=jnp.where(accept, x - state.x, state.moved),
            carry=select(accept, evaluation.carry, state.carry),
            mode=jnp.where(accept | give_up, GRADIENT, TRIAL).astype(jnp.int32),
            request=request,
            step=shorter,
            miss=miss,
            base_step=jnp.where(
                accept, state.step * self.grow, jnp.where(give_up, shorter, state.base_step)
            ),
            tries=tries,
            allowed=jnp.where(accept, self.first_tries, state.allowed + give_up),
            rounds=rounds,
            iterations=state.iterations + accept,
        )
        wrong = give_up & ~failed & steady & (jnp.abs(miss) > allowed)
        new = _end(new, wrong, Status.gradient_inconsistent)
        return _end(new, rounds > self.max_rounds, Status.stalled)


def _end(state: MAIDState, condition: Array, status: Any) -> MAIDState:
    ends = condition & ~state.done
    status = Status.where(ends, status, state.status)
    return dataclasses.replace(state, done=state.done | ends, status=status)
