"""HOAG: hyperparameter optimization with approximate gradients, with tolerances on a schedule."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.solvers._common import Box, resolution, select, success
from tolerax.status import Status, is_failed
from tolerax.validation import check_options


class HOAGState(eqx.Module):
    """The current and the previous point, the step constant, the place in the schedule."""

    x: Float[Array, " n"]
    last_x: Float[Array, " n"]
    last_f: Float[Array, ""]
    last_z: Float[Array, " n"]
    last_carry: PyTree
    carry: PyTree
    box: Box
    lipschitz: Float[Array, ""]
    iterations: Int[Array, ""]
    extra: Float[Array, ""]
    rejections: Int[Array, ""]
    scale: Float[Array, ""]
    done: Bool[Array, ""]
    status: Any


class HOAG(Solver):
    """Projected gradient steps with summable tolerances fixed in advance.

    Iteration k asks for state and adjoint to `tolerance * decay ** k` (`schedule="geometric"`) or
    `tolerance / (k + 1) ** power` (`"power"`), whatever the bounds say, and steps by `-z / L`. L
    starts at `|z| / sqrt(n)`, falls by 5 % while the value decreases as a smooth function would,
    and doubles when the value grows by a fifth, in which case the step is taken back.

    - `schedule`, `tolerance`, `decay`, `power`: the schedule; in the paper 0.9 ** k, 1/k^2, 1/k^3
      from 0.1.
    - `rtol`, `atol`: as in `InexactLineSearch`; the paper has no such test.

    Source: Pedregosa, *Hyperparameter optimization with approximate gradient* (ICML 2016), and the
    step rule of the author's public code, which applies each step twice; here once, as in the
    paper.

    >>> import jax.numpy as jnp, tolerax
    >>> problem = tolerax.Objective(lambda x: jnp.sum((x - 1.0) ** 2))
    >>> bool(tolerax.solve(problem, tolerax.HOAG(), jnp.zeros(2)).success)
    True
    """

    schedule: str = eqx.field(static=True, default="geometric")
    tolerance: float = 0.1
    decay: float = 0.9
    power: float = 2.0
    rtol: float = 1e-8
    atol: float = 1e-6

    def __check_init__(self):
        if self.schedule not in ("geometric", "power"):
            raise ValueError(f'schedule is {self.schedule!r}: use "geometric" or "power".')
        check_options(self, positive="tolerance", up_to_1="decay", at_least_0="power rtol atol")

    @property
    def honours_bounds(self) -> bool:
        return True

    def _tolerance(self, k: Array) -> Array:
        if self.schedule == "geometric":
            return self.tolerance * jnp.asarray(self.decay) ** k
        return self.tolerance / (k + 1.0) ** self.power

    def init(self, start: Start) -> HOAGState:
        x, _ = ravel_pytree(start.x)
        zero, inf = jnp.zeros((), x.dtype), jnp.array(jnp.inf, x.dtype)
        count = jnp.array(0, jnp.int32)
        return HOAGState(
            x=x,
            last_x=x,
            last_f=inf,
            last_z=jnp.zeros_like(x),
            last_carry=start.carry,
            carry=start.carry,
            box=Box.of(start),
            lipschitz=zero,
            iterations=count,
            extra=zero + 1,
            rejections=count,
            scale=zero,
            done=jnp.array(False),
            status=Status.running,
        )

    def ask(self, state: HOAGState) -> Query:
        tolerance = (self._tolerance(state.iterations) * state.extra).astype(state.x.dtype)
        return Query(state.box.unravel(state.x), Accuracy(tolerance, tolerance), state.carry)

    def tell(self, state: HOAGState, query: Query, evaluation: Evaluation) -> HOAGState:
        z, _ = ravel_pytree(evaluation.gradient)
        x, f, k = state.x, evaluation.value, state.iterations
        failed = is_failed(evaluation.status)
        first = state.scale == 0
        measure = state.box.stationarity(x, z)
        tiny = jnp.finfo(z.dtype).tiny
        scale = jnp.where(first, jnp.maximum(measure, tiny), state.scale)
        # A first tolerance may be so loose that the adjoint, hence the gradient, is still zero.
        unset = state.lipschitz == 0
        z_norm = jnp.where(failed, 0, jnp.linalg.norm(z))
        lipschitz = jnp.where(unset, z_norm / jnp.sqrt(z.size), state.lipschitz)
        moved = jnp.linalg.norm(x - state.last_x)
        now, ahead = self._tolerance(k), self._tolerance(k + 1)
        smooth = f <= state.last_f + ahead / 4 + 1.25 * now * moved - lipschitz * moved**2
        # The published rule is f >= 1.2 last_f, meant for values that are not negative.
        grew = f >= state.last_f + 0.2 * jnp.abs(state.last_f)
        reject = ~first & (failed | grew)
        lipschitz = jnp.where(~unset & smooth & ~reject, 0.95 * lipschitz, lipschitz)
        lipschitz = jnp.where(reject, 2 * lipschitz, lipschitz)
        base_x = jnp.where(reject, state.last_x, x)
        base_z = jnp.where(reject, state.last_z, z)
        carry = select(reject, state.last_carry, evaluation.carry)
        tolerance = self.atol + self.rtol * scale
        stationary = ~failed & (measure + evaluation.gradient_error <= tolerance)
        certified = evaluation.provenance.certified
        converged = Status.converged if certified else Status.converged_estimated
        new = HOAGState(
            x=state.box.clip(base_x - base_z / jnp.where(lipschitz > 0, lipschitz, 1)),
            last_x=base_x,
            last_f=jnp.where(reject, state.last_f, f),
            last_z=base_z,
            last_carry=carry,
            carry=carry,
            box=state.box,
            lipschitz=lipschitz,
            iterations=k + ~reject,
            extra=jnp.where(reject, 0.5 * state.extra, state.extra),
            rejections=jnp.where(reject, state.rejections + 1, 0),
            scale=scale,
            done=state.done,
            status=state.status,
        )
        new = _end(new, failed & first, Status.non_finite_start)
        floor = resolution(x, x - state.last_x, z - state.last_z)
        new = _end(new, stationary, success(converged, tolerance, floor))
        return _end(new, new.rejections > 60, Status.stalled)

    def terminate(self, state: HOAGState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: HOAGState, evaluation: Evaluation) -> Bool[Array, ""]:
        z, _ = ravel_pytree(evaluation.gradient)
        measure = state.box.stationarity(state.last_x, z) + evaluation.gradient_error
        return measure <= 2 * (self.atol + self.rtol * state.scale)

    def record(self, state: HOAGState) -> dict[str, Array]:
        return {"iteration": state.iterations, "step_size": 1 / state.lipschitz}


def _end(state: HOAGState, condition: Array, status: Any) -> HOAGState:
    ends = condition & ~state.done
    status = Status.where(ends, status, state.status)
    return dataclasses.replace(state, done=state.done | ends, status=status)
