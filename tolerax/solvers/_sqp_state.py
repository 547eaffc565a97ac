"""What sequential quadratic programming keeps between answers, and an answer as it sees it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Work
from tolerax.inner.kkt import KKTSystem
from tolerax.solvers._common import Box
from tolerax.solvers._subproblem import Rows
from tolerax.status import Status

#: What the next answer is of: a look at the point itself, a full step, a long one, one back.
LOOK, FULL, LONG, BACK = range(4)


class Iterate(eqx.Module):
    """A point with its multipliers, the step from there, the gradient of the Lagrangian there and
    the change of that gradient with the multipliers of the step.

    - `bend`: what curved constraints add to a step; `turn`: the length at which that is half of it.
    """

    x: Float[Array, " n"]
    y: Float[Array, " m"]
    d: Float[Array, " n"]
    e: Float[Array, " m"]
    slope: Float[Array, " n"]
    change: Float[Array, " n"]
    bend: Float[Array, " n"]
    turn: Float[Array, ""]

    def along(self, t: Float[Array, ""]) -> Float[Array, " n"]:
        """Where a step of length t leads from x: `t d + t^2 bend`, straight where that is more than
        half of the step, and with the second term of a full step where t is more than 1."""
        s = jnp.minimum(t, 1)
        return t * (self.d + jnp.where(s <= self.turn, s, 0) * self.bend)

    @property
    def reach(self) -> Float[Array, ""]:
        """The length of the first trial: a bend of more than twice the step says nothing of it."""
        return jnp.minimum(1, 4 * self.turn)


class Reference(eqx.Module):
    """The last iterate with a decrease: what the merit function is compared with."""

    at: Iterate
    merit: Float[Array, ""]
    descent: Float[Array, ""]
    size: Float[Array, ""]


class SQPState(eqx.Module):
    """What evolves: the iterate, the reference, the trial, penalties, counts."""

    now: Iterate
    ref: Reference
    eta: Float[Array, "2"]
    step: Float[Array, ""]
    first_merit: Float[Array, ""]
    kind: Int[Array, ""]
    relaxed: Int[Array, ""]
    trials: Int[Array, ""]
    caution: Int[Array, ""]
    blocked: Int[Array, ""]
    escapes: Int[Array, ""]
    steady: Bool[Array, ""]
    overshot: Int[Array, ""]
    flat: Int[Array, ""]
    least: Float[Array, ""]
    iterations: Int[Array, ""]
    scale: Float[Array, ""]
    measure: Float[Array, ""]
    request: Accuracy
    refinements: Int[Array, ""]
    carry: PyTree
    secant: Float[Array, "n n"] | None
    lower: Float[Array, " m"]
    upper: Float[Array, " m"]
    box: Box
    spent: Work
    done: Bool[Array, ""]
    status: Any
    bounded: bool = eqx.field(static=True)


class Told(eqx.Module):
    """An answer on flat vectors: `rows` are the constraints, then x itself where it has bounds;
    `slope` is the gradient of the Lagrangian, `left` what rows miss of what they should be, `z`
    both in the metric of the problem and `size` their norm there."""

    x: Float[Array, " n"]
    y: Float[Array, " m"]
    f: Float[Array, ""]
    g: Float[Array, " n"]
    rows: Rows
    slope: Float[Array, " n"]
    left: Float[Array, " m"]
    z: tuple[Float[Array, " n"], Float[Array, " m"]]
    system: KKTSystem
    size: Float[Array, ""]


def system_of(
    state: SQPState, evaluation: Evaluation, y: Float[Array, " m"] | None = None
) -> KKTSystem:
    """The operators of an answer on flat vectors, the Hessian with multipliers y."""
    unravel_x = ravel_pytree(state.box.like)[1]
    dtype, n, m = state.now.x.dtype, state.now.x.size, state.lower.size
    inner = m - n if state.bounded else m
    unravel_c: Any = ravel_pytree(evaluation.constraints)[1] if inner else None
    has_inverse = evaluation.preconditioner is not None

    def flat(tree: PyTree) -> Array:
        return ravel_pytree(tree)[0].astype(dtype)

    def rows(d: Array) -> Array:
        first = flat(evaluation.jacobian.mv(unravel_x(d))) if inner else d[:0]
        return jnp.concatenate([first, d]) if state.bounded else first

    def transposed(e: Array) -> Array:
        total = e[inner:] if state.bounded else jnp.zeros(n, dtype)
        return total + flat(evaluation.jacobian.rmv(unravel_c(e[:inner]))) if inner else total

    def hessian(d: Array) -> Array:
        if state.secant is not None:
            return state.secant @ d
        if y is None or not inner:
            return flat(evaluation.hessian.mv(unravel_x(d)))
        return flat(evaluation.hessian.mv(unravel_x(d), unravel_c(y[:inner])))

    def inverse(a: Array, b: Array) -> tuple[Array, Array]:
        left, right = evaluation.preconditioner.mv(unravel_x(a), unravel_c(b[:inner]))
        return flat(left), jnp.concatenate([flat(right), b[inner:]])

    if not has_inverse:
        return KKTSystem(hessian, rows, transposed, (n, m), dtype)
    price = getattr(evaluation.preconditioner, "work", None)
    return KKTSystem(hessian, rows, transposed, (n, m), dtype, inverse, price)


def merit_of(state: SQPState, told: Told) -> Float[Array, ""]:
    """The exact augmented Lagrangian at an answer."""
    (slope, left), (eta_1, eta_2) = told.z, state.eta
    penalty = jnp.dot(told.left, left)
    at = jnp.dot(told.y, told.left) + 0.5 * eta_1 * penalty
    return told.f + at + 0.5 * eta_2 * jnp.dot(told.slope, slope)


def replace(state: SQPState, **changes: Any) -> SQPState:
    return dataclasses.replace(state, **changes)


def finish_if(state: SQPState, condition: Array, status: Any) -> SQPState:
    ends = condition & ~state.done
    return replace(state, done=state.done | ends, status=Status.where(ends, status, state.status))
