"""Sequential quadratic programming on an exact augmented Lagrangian, with inexact inner solves."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start, Work
from tolerax.inner.kkt import DenseKKT, KKTSolver, KKTSystem, KrylovKKT
from tolerax.solvers._common import Box, failure, select
from tolerax.solvers._subproblem import Rows, Step, quadratic_step
from tolerax.status import PointStatus, Status, is_failed

LOOK, FULL, LONG, BACK = range(4)
#: Above this many unknowns and rows matrices are no longer formed.
DENSE_UP_TO = 1000


class Iterate(eqx.Module):
    """A point with its multipliers, the step from there, the gradient of the Lagrangian there and
    the change of that gradient with the multipliers of the step."""

    x: Float[Array, " n"]
    y: Float[Array, " m"]
    d: Float[Array, " n"]
    e: Float[Array, " m"]
    slope: Float[Array, " n"]
    change: Float[Array, " n"]


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
    steady: Bool[Array, ""]
    iterations: Int[Array, ""]
    scale: Float[Array, ""]
    f_scale: Float[Array, ""]
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
    only_equalities: bool = eqx.field(static=True)


class Told(eqx.Module):
    """An answer on flat vectors: `rows` are the constraints, then x itself where it has bounds."""

    x: Float[Array, " n"]
    y: Float[Array, " m"]
    f: Float[Array, ""]
    g: Float[Array, " n"]
    rows: Rows
    slope: Float[Array, " n"]
    z: tuple[Float[Array, " n"], Float[Array, " m"]]
    size: Float[Array, ""]


class ExactAugmentedLagrangian(Solver):
    """SQP for equality and inequality constraints and bounds, with second derivatives.

    Every step solves a quadratic program in x and multipliers y: its optimality conditions to a
    tolerance that falls with the residual. Steps are judged by the exact augmented Lagrangian

        f + sum of y_i (c_i - s_i) + eta_1 / 2 |c - s|^2 + eta_2 / 2 |grad_x L|^2 ,

    with s the admissible values nearest to `c + y / eta_1`. It is smooth and has its minimum at the
    solution, so a plain sufficient-decrease test in (x, y) accepts full steps near it. Where a step
    does not descend, eta_1 rises, eta_2 falls and the inner solve goes on. Up to `patience` full
    steps may pass without decrease before the search returns to where they began.

    - `rtol`, `atol`: converged when the norm of `(grad_x L, c - P(c + y))` plus the error bound of
      the gradient is at most `atol + rtol * (the same at x0)`, and the violation at most
      `feasible_at`. P is the projection onto the admissible values. Problems that supply a
      `preconditioner` have the norms measured in it.
    - `eta`: the first penalties. `patience`: see above. `forcing`: the largest relative residual
      of an inner solve.
    - `linear`: a solver of the KKT systems: [`DenseKKT`][] (default up to 1000 unknowns and rows),
      [`KrylovKKT`][] (default above, and for problems with a preconditioner), or
      [`SketchAndProject`][].
    - `second_order`: `False` takes BFGS updates in place of Hessian products; `solve` sets it for
      Python code.

    Source: merit function, penalty and accuracy rule: Hong, Na, Mahoney, Kolar (ICML 2023, arXiv
    2305.18379), with the Hessian of the Lagrangian in the last term; stabilized subproblems: Wright
    (*Comput. Optim. Appl.* 11, 1998); merit with slacks: Gill, Murray, Saunders, Wright (NPSOL);
    relaxed steps: Chamberlain, Powell, Lemarechal, Pedersen (*Math. Program. Study* 16, 1982).

    >>> import jax.numpy as jnp, tolerax
    >>> circle = tolerax.Objective(
    ...     lambda x: x[0] + x[1],
    ...     constraints=lambda x: x @ x,
    ...     constraint_bounds=(2.0, 2.0),
    ... )
    >>> solution = tolerax.solve(circle, tolerax.ExactAugmentedLagrangian(), jnp.array([-2.0, 0.0]))
    >>> solution.x.round(6)
    Array([-1., -1.], dtype=float64)
    """

    rtol: float = 0.0
    atol: float = 1e-6
    feasible_at: float = 1e-6
    eta: tuple[float, float] = (1.0, 0.1)
    patience: int = 4
    forcing: float = 0.3
    linear: KKTSolver | None = None
    second_order: bool = eqx.field(static=True, default=True)
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-3, 1e-3))
    sufficient_decrease: float = 1e-4
    max_trials: int = 25

    def __check_init__(self):
        for name in ("rtol", "atol", "feasible_at"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not value >= 0:
                raise ValueError(f"{name} is {value}: it must not be negative.")
        if not isinstance(self.eta[0], jax.Array) and not (self.eta[0] > 0 and self.eta[1] > 0):
            raise ValueError(f"eta is {self.eta}: both penalties must be positive.")

    @property
    def honours_bounds(self) -> bool:
        return True

    @property
    def honours_constraints(self) -> bool:
        return True

    @property
    def feasibility(self) -> ArrayLike:
        return self.feasible_at

    def by_gradients(self) -> "ExactAugmentedLagrangian":
        return dataclasses.replace(self, second_order=False)

    # -- the four methods -------------------------------------------------------------------------

    def init(self, start: Start) -> SQPState:
        x, _ = ravel_pytree(start.x)
        dtype, n = x.dtype, x.size
        box = Box.of(start)
        sides = [jnp.zeros(0, dtype), jnp.zeros(0, dtype)]
        equal = True
        if start.constraint_bounds is not None:
            sides = [ravel_pytree(side)[0].astype(dtype) for side in start.constraint_bounds]
            equal = _all_equal(*sides)
        bounded = start.bounds is not None
        if bounded:
            sides = [jnp.concatenate([a, b]) for a, b in zip(sides, (box.lower, box.upper))]
        m = sides[0].size
        zero, inf, count = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype), jnp.array(0, jnp.int32)
        of_x, of_y = jnp.zeros(n, dtype), jnp.zeros(m, dtype)
        now = Iterate(x, of_y, of_x, of_y, of_x, of_x)
        return SQPState(
            now=now,
            ref=Reference(now, inf, zero, inf),
            eta=jnp.asarray(self.eta, dtype),
            step=zero,
            first_merit=inf,
            kind=jnp.array(LOOK, jnp.int32),
            relaxed=count,
            trials=count,
            caution=count,
            blocked=count,
            steady=jnp.array(False),
            iterations=count,
            scale=zero,
            f_scale=zero,
            measure=inf,
            request=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.accuracy),
            refinements=count,
            carry=start.carry,
            secant=None if self.second_order else jnp.eye(n, dtype=dtype),
            lower=sides[0],
            upper=sides[1],
            box=box,
            spent=Work(),
            done=jnp.array(False),
            status=Status.running,
            bounded=bounded,
            only_equalities=equal and not bounded,
        )

    def ask(self, state: SQPState) -> Query:
        x = state.box.unravel(self._trial(state)[0])
        derivatives = 2 if self.second_order else 1
        return Query(x, state.request, state.carry, derivatives=derivatives)

    def tell(self, state: SQPState, query: Query, evaluation: Evaluation) -> SQPState:
        system = self._system(state, evaluation)
        told = self._told(state, query, evaluation, system)
        error = evaluation.gradient_error.astype(told.x.dtype)
        failed = is_failed(evaluation.status) | ~jnp.isfinite(told.size + told.f)
        first = state.scale == 0
        state = _replace(
            state,
            scale=jnp.where(first, jnp.maximum(told.size, jnp.finfo(told.x.dtype).tiny), state.scale),
            f_scale=jnp.where(first, jnp.abs(told.f), state.f_scale),
            carry=select(failed, state.carry, evaluation.carry),
        )
        state = _finish_if(state, failed & first, Status.non_finite_start)
        violation = jnp.zeros(()) if evaluation.violation is None else evaluation.violation
        feasible = violation <= self.feasible_at
        measure = self._measure(told) + error
        holds = ~failed & feasible & (measure <= self._tolerance(state))
        at_end = Iterate(told.x, told.y, *(0 * leaf for leaf in _rest(state.now)))
        converged = Status.where(
            jnp.array(evaluation.provenance.certified), Status.converged, Status.converged_estimated
        )
        state = _replace(
            state,
            now=select(holds, at_end, state.now),
            measure=jnp.where(failed, state.measure, measure),
        )
        state = _finish_if(state, holds, converged)
        limit = -(1 + state.f_scale) * jnp.finfo(told.x.dtype).eps ** -1.5
        state = _finish_if(state, ~failed & feasible & (told.f <= limit), Status.unbounded)
        contradicted = evaluation.status == PointStatus.contradicted
        state = _finish_if(state, contradicted, Status.contradicted)
        # Where the error of the gradient hides what is left, a closer look comes first.
        vague = ~failed & (error > 0.25 * jnp.maximum(measure - error, 0.5 * self._tolerance(state)))
        hopeless = state.refinements >= 12
        state = _finish_if(state, vague & hopeless, failure(evaluation.status))
        branch = jnp.where(state.done, 0, jnp.where(vague, 1, jnp.where(failed, 2, 3)))
        merit = self._merit(state, told)
        return jax.lax.switch(
            branch,
            [
                lambda: state,
                lambda: self._closer(state, evaluation, measure, error),
                lambda: self._refused(state, jnp.full_like(merit, jnp.inf)),
                lambda: self._judge(state, told, system, merit),
            ],
        )

    def terminate(self, state: SQPState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: SQPState, evaluation: Evaluation) -> Bool[Array, ""]:
        # The multipliers are those of the claim; the tolerance is met up to rounding.
        look = _replace(state, kind=jnp.array(LOOK, jnp.int32), scale=jnp.maximum(state.scale, 1e-300))
        query = Query(state.box.unravel(state.now.x), state.request)
        told = self._told(look, query, evaluation, self._system(state, evaluation))
        return self._measure(told) + evaluation.gradient_error <= 2 * self._tolerance(state)

    def work(self, state: SQPState) -> Work:
        return state.spent

    def record(self, state: SQPState) -> dict[str, Array]:
        return {
            "iteration": state.iterations,
            "step_size": state.step,
            "optimality": state.measure,
            "penalty": state.eta[0],
        }

    # -- an answer --------------------------------------------------------------------------------

    def _trial(self, state: SQPState) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """Where the next answer is wanted, and the multipliers there."""
        base = select(state.kind == BACK, state.ref.at, state.now)
        moves = state.kind != LOOK
        x = jnp.where(moves, base.x + state.step * base.d, base.x)
        y = jnp.where(moves, base.y + state.step * base.e, base.y)
        # A step that ends at a bound ends there to the last bit.
        eps = 8 * jnp.finfo(x.dtype).eps
        for side in (state.box.lower, state.box.upper):
            near = jnp.abs(x - side) <= eps * (1 + jnp.abs(side))
            x = jnp.where(near, side, x)
        return state.box.clip(x), y

    def _system(self, state: SQPState, evaluation: Evaluation) -> KKTSystem:
        """The operators of an answer on flat vectors."""
        unravel_x = ravel_pytree(state.box.like)[1]
        n, m = state.now.x.size, state.lower.size
        inner = m - n if state.bounded else m
        flat = lambda tree: ravel_pytree(tree)[0].astype(state.now.x.dtype)  # noqa: E731
        unravel_c: Any = None if inner == 0 else ravel_pytree(evaluation.constraints)[1]

        def rows(d: Array) -> Array:
            parts = [] if inner == 0 else [flat(evaluation.jacobian.mv(unravel_x(d)))]
            return jnp.concatenate([*parts, d]) if state.bounded else jnp.concatenate(parts) if parts else d[:0]

        def transposed(e: Array) -> Array:
            total = e[inner:] if state.bounded else jnp.zeros(n, e.dtype)
            return total if inner == 0 else total + flat(evaluation.jacobian.rmv(unravel_c(e[:inner])))

        def preconditioner(a: Array, b: Array) -> tuple[Array, Array]:
            left, right = evaluation.preconditioner.mv(unravel_x(a), unravel_c(b[:inner]))
            return flat(left), jnp.concatenate([flat(right), b[inner:]])

        _, y = self._trial(state)

        def hessian(d: Array) -> Array:
            if state.secant is not None:
                return state.secant @ d
            if inner == 0:
                return flat(evaluation.hessian.mv(unravel_x(d)))
            return flat(evaluation.hessian.mv(unravel_x(d), unravel_c(y[:inner])))

        has = getattr(evaluation, "preconditioner", None) is not None
        return KKTSystem(
            hessian, rows, transposed, (n, m), state.now.x.dtype, preconditioner if has else None
        )
