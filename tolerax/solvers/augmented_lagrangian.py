"""Sequential quadratic programming on an exact augmented Lagrangian, with inexact inner solves."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start, Work
from tolerax.inner.kkt import DenseKKT, KKTSolver, check_size
from tolerax.inner.metric import definite_norm
from tolerax.solvers._common import Box, failure, resolution, select, success
from tolerax.solvers._sqp_plan import linear_solver, plan
from tolerax.solvers._sqp_state import (
    BACK,
    FULL,
    LONG,
    LOOK,
    Iterate,
    Reference,
    SQPState,
    Told,
    finish_if,
    merit_of,
    replace,
    system_of,
)
from tolerax.solvers._subproblem import Rows
from tolerax.status import PointStatus, Status, is_failed

#: Full steps without any effect after which rounding is what is left.
FLAT = 6


class ExactAugmentedLagrangian(Solver):
    """SQP for equality and inequality constraints and bounds, with second derivatives.

    Every step solves a quadratic program in x and multipliers y: its optimality conditions to a
    tolerance that falls with the residual. Steps are judged by the exact augmented Lagrangian

        f + sum of y_i (c_i - s_i) + eta_1 / 2 |c - s|^2 + eta_2 / 2 |grad_x L|^2 ,

    with s the admissible values nearest to `c + y / eta_1`. It is smooth and has its minimum at the
    solution, so a plain sufficient-decrease test in (x, y) accepts full steps near it. Where a step
    does not descend, eta_1 rises, eta_2 falls and the inner solve goes on. Up to `patience` full
    steps may pass without decrease before the search returns to where they began.

    Where matrices are factored, steps follow curved constraints to second order, `x + t d + t^2 b`:
    second derivatives of constraints are known, so this takes no further point. They go straight
    where the bend would be more than half of the step, and a first trial is shorter where it would
    be more than twice as long.

    - `rtol`, `atol`: converged when the norm of `(grad_x L, c - P(c + y))` plus the error bound of
      the gradient is at most `atol + rtol * (the same at x0)`, and the violation at most
      `feasible_at`. P is the projection onto the admissible values. Problems that supply a
      `preconditioner` have the norms measured in it.
    - `eta`: the first penalties. `patience`: see above. `forcing`: the largest relative residual
      of an inner solve.
    - `linear`: a solver of the KKT systems: [`DenseKKT`][] (default up to 1000 unknowns and rows),
      [`KrylovKKT`][] (default above, and for problems with a preconditioner), or
      [`SketchAndProject`][].
    - `multipliers`: those of the constraints to begin with, a pytree like them, for instance from a
      coarser grid; by default those that fit the gradient at x0, or 0. What a run ended with is
      `solution.state.solver_state.now.y`, flat.
    - `second_order`: `False` takes BFGS updates in place of Hessian products, as is done anyway
      where a problem gives none.

    Source: merit function, penalty and accuracy rule: Hong, Na, Mahoney, Kolar (ICML 2023, arXiv
    2305.18379), with the Hessian of the Lagrangian in the last term; stabilized subproblems: Wright
    (*Comput. Optim. Appl.* 11, 1998); merit with slacks: Gill, Murray, Saunders, Wright (NPSOL);
    relaxed steps: Chamberlain, Powell, Lemarechal, Pedersen (*Math. Program. Study* 16, 1982); arcs
    from second derivatives: McCormick (*SIAM J. Control* 13, 1975), with the test of their lengths
    of Transtrum, Sethna (arXiv 1201.5885).

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

    rtol: ArrayLike = 0.0
    atol: ArrayLike = 1e-6
    feasible_at: ArrayLike = 1e-6
    eta: tuple[ArrayLike, ArrayLike] = (1.0, 0.1)
    patience: int = 4
    forcing: ArrayLike = 0.3
    linear: Any = None
    multipliers: PyTree[Float[Array, "..."]] | None = None
    second_order: bool = eqx.field(static=True, default=True)
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-3, 1e-3))
    sufficient_decrease: ArrayLike = 1e-4
    max_trials: int = 25

    def __check_init__(self):
        for name in ("rtol", "atol", "feasible_at"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not value >= 0:
                raise ValueError(f"{name} is {value}: it must not be negative.")
        if any(not isinstance(eta, jax.Array) and not float(eta) > 0 for eta in self.eta):  # pyright: ignore[reportArgumentType]
            raise ValueError(f"eta is {self.eta}: both penalties must be positive.")
        if not isinstance(self.forcing, jax.Array) and not 0 < float(self.forcing) < 1:  # pyright: ignore[reportArgumentType]
            raise ValueError(f"forcing is {self.forcing}: it must lie between 0 and 1.")
        if not isinstance(self.linear, KKTSolver | None):
            raise TypeError(
                f"linear is {self.linear!r}: give a solver of KKT systems, for instance "
                "`tolerax.inner.KrylovKKT(tolerax.inner.MINRES())`."
            )

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
        if start.constraint_bounds is not None:
            sides = [ravel_pytree(side)[0].astype(dtype) for side in start.constraint_bounds]
        bounded = start.bounds is not None
        if bounded:
            sides = [
                jnp.concatenate([a, b]) for a, b in zip(sides, (box.lower, box.upper), strict=True)
            ]
        m = sides[0].size
        zero, inf, count = jnp.zeros((), dtype), jnp.array(jnp.inf, dtype), jnp.array(0, jnp.int32)
        of_x, of_y = jnp.zeros(n, dtype), jnp.zeros(m, dtype)
        first = of_y
        if self.multipliers is not None:
            given = ravel_pytree(self.multipliers)[0].astype(dtype)
            inner = m - n if bounded else m
            if given.size != inner:
                raise ValueError(
                    f"multipliers have {given.size} entries: give one for each of the {inner} "
                    "constraints."
                )
            first = of_y.at[:inner].set(given)
        now = Iterate(x, first, of_x, of_y, of_x, of_x, of_x, inf)
        by_gradients = not self.second_order
        if not by_gradients:
            second = start.answer(Query(start.x, self.accuracy, start.carry, derivatives=2))
            by_gradients = getattr(second, "hessian", None) is None
        if by_gradients:
            check_size(n, n, dtype, "give second derivatives, which it replaces")
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
            escapes=count,
            steady=jnp.array(False),
            overshot=count,
            flat=count,
            least=inf,
            iterations=count,
            scale=zero,
            measure=inf,
            request=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.accuracy),
            refinements=count,
            carry=start.carry,
            secant=jnp.eye(n, dtype=dtype) if by_gradients else None,
            lower=sides[0],
            upper=sides[1],
            box=box,
            spent=Work(),
            done=jnp.array(False),
            status=Status.running,
            bounded=bounded,
        )

    def ask(self, state: SQPState) -> Query:
        x = state.box.unravel(self._trial(state)[0])
        derivatives = 2 if state.secant is None else 1
        return Query(x, state.request, state.carry, derivatives=derivatives)

    def tell(self, state: SQPState, query: Query, evaluation: Evaluation) -> SQPState:
        told = self._told(state, evaluation)
        if told.system.price is not None:
            state = replace(state, spent=state.spent + told.system.price)
        error = evaluation.gradient_error.astype(told.x.dtype)
        error = jnp.where(jnp.isnan(error), jnp.inf, error)
        rows = jnp.concatenate([told.slope, told.left])
        failed = is_failed(evaluation.status) | ~jnp.isfinite(told.f + jnp.sum(rows))
        # Finite derivatives without a finite norm: the preconditioner is not positive definite.
        state = finish_if(state, ~failed & (told.size == jnp.inf), Status.inner_failed)
        first, tiny = state.scale == 0, jnp.finfo(told.x.dtype).tiny
        state = replace(
            state,
            scale=jnp.where(first & ~failed, jnp.maximum(told.size, tiny), state.scale),
            carry=select(failed, state.carry, evaluation.carry),
        )
        state = finish_if(state, failed & first, Status.non_finite_start)
        violation = jnp.zeros(()) if evaluation.violation is None else evaluation.violation
        feasible = violation <= self.feasible_at
        measure = self._measure(told)
        tolerance = self._tolerance(state)
        merit = merit_of(state, told)
        y, least = self._refitted(state, told, measure, feasible & ~failed)
        holds = ~failed & feasible & (least + error <= tolerance)
        if evaluation.violation is None:
            # Without constraints a lower point that was seen is a better one.
            slack = 64 * jnp.finfo(merit.dtype).eps * (1 + jnp.abs(merit))
            holds = holds & (merit <= state.ref.merit + slack)
        certified = evaluation.provenance.certified
        converged = Status.converged if certified else Status.converged_estimated
        base = select(state.kind == BACK, state.ref.at, state.now)
        change = told.slope - (base.slope + state.step * base.change)
        converged = success(converged, tolerance, resolution(told.x, told.x - base.x, change))
        here = dataclasses.replace(state.now, x=told.x, y=y)
        state = replace(state, now=select(holds, here, state.now))
        state = finish_if(state, holds, converged)
        contradicted = evaluation.status == PointStatus.contradicted
        state = finish_if(state, contradicted, Status.contradicted)
        # Where the error of the gradient may hide what is left, a closer look comes first.
        vague = ~failed & (error > 0.25 * jnp.maximum(measure, 0.5 * tolerance))
        hopeless = vague & (state.refinements >= 12)
        state = finish_if(state, hopeless, failure(evaluation.status))
        flat = jnp.where(failed | vague, state.flat, self._flat(state, told, merit))
        state = replace(state, flat=flat, least=jnp.fmin(state.least, told.size))
        rounding = 1e4 * jnp.finfo(told.x.dtype).eps * state.scale
        state = finish_if(state, (flat >= FLAT) & (measure <= rounding), Status.accuracy_floor)
        branch = jnp.where(failed, 1, jnp.where(vague, 2, 3))
        told_of = jax.lax.switch(
            jnp.where(state.done, 0, branch),
            [
                lambda: state,
                lambda: self._refused(state, jnp.full_like(merit, jnp.inf)),
                lambda: self._closer(state, evaluation, measure, error),
                lambda: self._judge(state, evaluation, told, merit),
            ],
        )
        return replace(told_of, measure=jnp.where(failed, state.measure, measure))

    def terminate(self, state: SQPState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: SQPState, evaluation: Evaluation) -> Bool[Array, ""]:
        # The multipliers are those of the claim; the tolerance is met up to rounding.
        told = self._told(replace(state, kind=jnp.array(LOOK, jnp.int32)), evaluation)
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
        x = jnp.where(moves, base.x + base.along(state.step), base.x)
        y = jnp.where(moves, base.y + state.step * base.e, base.y)
        # A step that ends at a bound ends there to the last bit.
        eps = 8 * jnp.finfo(x.dtype).eps
        for side in (state.box.lower, state.box.upper):
            near = (jnp.abs(x - side) <= eps * (1 + jnp.abs(side))) & jnp.isfinite(side)
            x = jnp.where(near, side, x)
        return state.box.clip(x), y

    def _told(self, state: SQPState, evaluation: Evaluation) -> Told:
        """The answer on flat vectors, with the multipliers of the trial or, at the start, those
        that fit the gradient best."""
        x, y = self._trial(state)
        dtype = x.dtype
        f = evaluation.value.astype(dtype)
        g = ravel_pytree(evaluation.gradient)[0].astype(dtype)
        c = ravel_pytree(evaluation.constraints)[0].astype(dtype)
        c = jnp.concatenate([c, x]) if state.bounded else c
        rows = Rows(c, state.lower, state.upper)
        system = system_of(state, evaluation)
        linear = linear_solver(self, system)
        if isinstance(linear, DenseKKT):
            system = system.in_full()
        if system.preconditioner is None and c.size and self.multipliers is None:
            # Far from feasible points the best fit bends the model the wrong way.
            near = jnp.linalg.norm(c - rows.within(c)) < 0.9 * jnp.linalg.norm(g)
            fit = lambda: linear.multipliers(system, g, rows.equal)  # noqa: E731
            y = jax.lax.cond((state.scale == 0) & near, fit, lambda: y)
        slope = g + system.transposed(y)
        left = c - rows.within(c + y / state.eta[0])
        inverse = system.preconditioner
        z = (slope, left) if inverse is None else inverse(slope, left)
        size = definite_norm(jnp.concatenate([slope, left]), jnp.concatenate(z))
        return Told(x, y, f, g, rows, slope, left, z, system, size)

    def _measure(self, told: Told) -> Float[Array, ""]:
        """How far the optimality conditions are from holding."""
        natural = told.rows.values - told.rows.within(told.rows.values + told.y)
        plain = jnp.sqrt(jnp.sum(told.slope**2) + jnp.sum(natural**2))
        preconditioned = told.z[0] is not told.slope
        return told.size if preconditioned else plain

    def _refitted(
        self, state: SQPState, told: Told, measure: Float[Array, ""], near: Bool[Array, ""]
    ) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        """The multipliers, or those that fit best where the conditions hold better with them, and
        how far they are from holding: where constraints depend on each other, steps move
        multipliers far along what no point determines. Not with BFGS updates, where that was
        not seen."""
        dense = isinstance(linear_solver(self, told.system), DenseKKT)
        if not told.y.size or not dense or state.secant is not None:
            return told.y, measure

        def fit() -> tuple[Array, Array]:
            active = told.rows.active(told.rows.values + told.y)
            y = DenseKKT().multipliers(told.system, told.g, active)
            slope = told.g + told.system.transposed(y)
            z = slope, told.left
            least = self._measure(dataclasses.replace(told, y=y, slope=slope, z=z))
            better = least < measure
            return jnp.where(better, y, told.y), jnp.where(better, least, measure)

        return jax.lax.cond(near, fit, lambda: (told.y, measure))

    def _tolerance(self, state: SQPState) -> Float[Array, ""]:
        return jnp.asarray(self.atol + self.rtol * state.scale)

    def _flat(self, state: SQPState, told: Told, merit: Array) -> Array:
        """How many full steps in a row neither changed the merit, up to rounding, nor left half of
        the least that was left of the optimality conditions."""
        ref, eps = state.ref, jnp.finfo(merit.dtype).eps
        same = jnp.abs(merit - ref.merit) <= 64 * eps * (jnp.abs(told.f) + jnp.abs(ref.merit))
        same = same & (told.size > 0.5 * state.least)
        return jnp.where(state.kind == FULL, jnp.where(same, state.flat + 1, 0), state.flat)

    # -- trials -----------------------------------------------------------------------------------

    def _closer(
        self, state: SQPState, evaluation: Evaluation, measure: Array, error: Array
    ) -> SQPState:
        """The same point again, more accurately."""
        target = 0.1 * jnp.maximum(measure - error, self._tolerance(state))
        factor = jnp.clip(target / error, 1e-3, 0.5)
        request = jax.tree.map(jnp.minimum, evaluation.achieved * factor, state.request * 0.5)
        return replace(state, request=request, refinements=state.refinements + 1)

    def _judge(self, state: SQPState, evaluation: Evaluation, told: Told, merit: Array) -> SQPState:
        """Accept a trial, let it pass for now, or go back."""
        ref, kind = state.ref, state.kind
        eps = jnp.finfo(merit.dtype).eps
        length = jnp.minimum(state.step, 1.0)
        needed = ref.merit + self.sufficient_decrease * length * ref.descent
        rounding = 64 * eps * (jnp.abs(told.f) + jnp.abs(ref.merit))
        falls = (merit <= needed) & (ref.descent < 0)
        # Where values cannot be told apart the optimality conditions decide.
        falls = falls | ((merit <= ref.merit + rounding) & (told.size <= 0.9 * ref.size))
        halves = told.size <= 0.5 * state.measure
        accepted = (kind == LOOK) | (falls & ((kind != LONG) | halves))
        full = (kind == FULL) & (state.step == 1)
        passes = full & (state.relaxed < self.patience) & (told.size <= 1e4 * ref.size)
        passes = passes & jnp.isfinite(merit) & ~accepted
        state = replace(
            state,
            first_merit=jnp.where((kind == FULL) & (state.relaxed == 0), merit, state.first_merit),
        )

        def go_on() -> SQPState:
            moved = replace(
                state,
                relaxed=jnp.where(passes, state.relaxed + 1, 0),
                # A step that only passes for now has not shown that it was one.
                caution=jnp.where(accepted & (kind != LOOK), 0, state.caution),
                iterations=state.iterations + (kind != LOOK),
            )
            return plan(self, moved, evaluation, told, merit)

        return jax.lax.cond(accepted | passes, go_on, lambda: self._refused(state, merit))

    def _refused(self, state: SQPState, merit: Array) -> SQPState:
        """A shorter step: the plain one after a long one, else one from the reference."""
        kind, ref = state.kind, state.ref
        from_full = (kind == FULL) & (state.relaxed > 0)
        value = jnp.where(from_full, state.first_merit, merit)
        length = jnp.where(kind == BACK, state.step, ref.at.reach)
        drop = value - ref.merit - length * ref.descent
        parabola = -ref.descent * length / (2 * drop)
        factor = jnp.where(jnp.isfinite(value), jnp.clip(parabola, 0.1, 0.5), 0.1)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.5)
        step = length * factor
        trials = state.trials + 1
        shorter = replace(
            state,
            step=jnp.where(kind == LONG, state.now.reach, step).astype(state.step.dtype),
            kind=jnp.where(kind == LONG, FULL, BACK).astype(jnp.int32),
            relaxed=jnp.where(kind == LONG, state.relaxed, 0),
            overshot=state.overshot + (kind == LONG),
            trials=jnp.where(kind == LONG, 0, trials),
        )
        reach = jnp.max(jnp.abs(step * ref.at.d) / (1 + jnp.abs(ref.at.x)), initial=0)
        over = (kind != LONG) & ((trials > self.max_trials) | (reach < jnp.finfo(step.dtype).eps))
        # Begin again from the reference, more cautiously; three times is enough.
        again = replace(
            state,
            now=ref.at,
            kind=jnp.array(LOOK, jnp.int32),
            caution=state.caution + 1,
            relaxed=jnp.zeros_like(state.relaxed),
            trials=jnp.zeros_like(state.trials),
        )
        hopeless = state.caution >= 3
        again = finish_if(
            again,
            hopeless,
            Status.where(state.blocked > 0, Status.infeasible, Status.stalled),
        )
        return select(over, again, shorter)
