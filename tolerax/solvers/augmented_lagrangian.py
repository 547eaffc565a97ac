"""Sequential quadratic programming on an exact augmented Lagrangian, with inexact inner solves."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start, Work
from tolerax.inner.kkt import DenseKKT, KKTSolver, KKTSystem, KrylovKKT, Matrix
from tolerax.solvers._common import Box, failure, resolution, select, success
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
    - `multipliers`: those of the constraints to begin with, a pytree like them, for instance from a
      coarser grid; by default those that fit the gradient at x0, or 0. What a run ended with is
      `solution.state.solver_state.now.y`, flat.
    - `second_order`: `False` takes BFGS updates in place of Hessian products, as is done anyway
      where a problem gives none.

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

    rtol: ArrayLike = 0.0
    atol: ArrayLike = 1e-6
    feasible_at: ArrayLike = 1e-6
    eta: tuple[ArrayLike, ArrayLike] = (1.0, 0.1)
    patience: int = 4
    forcing: ArrayLike = 0.3
    linear: KKTSolver | None = None
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
        now = Iterate(x, first, of_x, of_y, of_x, of_x)
        by_gradients = not self.second_order
        if not by_gradients:
            second = start.answer(Query(start.x, self.accuracy, start.carry, derivatives=2))
            by_gradients = getattr(second, "hessian", None) is None
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
            state = _replace(state, spent=state.spent + told.system.price)
        error = evaluation.gradient_error.astype(told.x.dtype)
        failed = is_failed(evaluation.status) | ~jnp.isfinite(told.size + told.f)
        first, tiny = state.scale == 0, jnp.finfo(told.x.dtype).tiny
        state = _replace(
            state,
            scale=jnp.where(first & ~failed, jnp.maximum(told.size, tiny), state.scale),
            f_scale=jnp.where(first & ~failed, jnp.abs(told.f), state.f_scale),
            carry=select(failed, state.carry, evaluation.carry),
        )
        state = _finish_if(state, failed & first, Status.non_finite_start)
        violation = jnp.zeros(()) if evaluation.violation is None else evaluation.violation
        feasible = violation <= self.feasible_at
        measure = self._measure(told)
        tolerance = self._tolerance(state)
        merit = self._merit(state, told)
        holds = ~failed & feasible & (measure + error <= tolerance)
        if evaluation.violation is None:
            # Without constraints a lower point that was seen is a better one.
            slack = 64 * jnp.finfo(merit.dtype).eps * (1 + jnp.abs(merit))
            holds = holds & (merit <= state.ref.merit + slack)
        certified = evaluation.provenance.certified
        converged = Status.converged if certified else Status.converged_estimated
        base = select(state.kind == BACK, state.ref.at, state.now)
        change = told.slope - (base.slope + state.step * base.change)
        converged = success(converged, tolerance, resolution(told.x, told.x - base.x, change))
        here = dataclasses.replace(state.now, x=told.x, y=told.y)
        state = _replace(state, now=select(holds, here, state.now))
        state = _finish_if(state, holds, converged)
        limit = -(1 + state.f_scale) * jnp.finfo(told.x.dtype).eps ** -1.5
        state = _finish_if(state, ~failed & feasible & (told.f <= limit), Status.unbounded)
        contradicted = evaluation.status == PointStatus.contradicted
        state = _finish_if(state, contradicted, Status.contradicted)
        # Where the error of the gradient may hide what is left, a closer look comes first.
        vague = ~failed & (error > 0.25 * jnp.maximum(measure, 0.5 * tolerance))
        hopeless = vague & (state.refinements >= 12)
        state = _finish_if(state, hopeless, failure(evaluation.status))
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
        return _replace(told_of, measure=jnp.where(failed, state.measure, measure))

    def terminate(self, state: SQPState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: SQPState, evaluation: Evaluation) -> Bool[Array, ""]:
        # The multipliers are those of the claim; the tolerance is met up to rounding.
        told = self._told(_replace(state, kind=jnp.array(LOOK, jnp.int32)), evaluation)
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
            near = (jnp.abs(x - side) <= eps * (1 + jnp.abs(side))) & jnp.isfinite(side)
            x = jnp.where(near, side, x)
        return state.box.clip(x), y

    def _system(
        self, state: SQPState, evaluation: Evaluation, y: Float[Array, " m"] | None = None
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
        system = self._system(state, evaluation)
        linear = self._linear(system)
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
        size = jnp.sqrt(jnp.maximum(jnp.dot(slope, z[0]) + jnp.dot(left, z[1]), 0))
        return Told(x, y, f, g, rows, slope, left, z, system, size)

    def _linear(self, system: KKTSystem) -> KKTSolver:
        if self.linear is not None:
            return self.linear
        large = sum(system.count) > DENSE_UP_TO
        return KrylovKKT() if large or system.preconditioner is not None else DenseKKT()

    def _measure(self, told: Told) -> Float[Array, ""]:
        """How far the optimality conditions are from holding."""
        natural = told.rows.values - told.rows.within(told.rows.values + told.y)
        plain = jnp.sqrt(jnp.sum(told.slope**2) + jnp.sum(natural**2))
        preconditioned = told.z[0] is not told.slope
        return told.size if preconditioned else plain

    def _merit(self, state: SQPState, told: Told) -> Float[Array, ""]:
        """The exact augmented Lagrangian at an answer."""
        (slope, left), (eta_1, eta_2) = told.z, state.eta
        penalty = jnp.dot(told.left, left)
        at = jnp.dot(told.y, told.left) + 0.5 * eta_1 * penalty
        return told.f + at + 0.5 * eta_2 * jnp.dot(told.slope, slope)

    def _tolerance(self, state: SQPState) -> Float[Array, ""]:
        return jnp.asarray(self.atol + self.rtol * state.scale)

    # -- trials -----------------------------------------------------------------------------------

    def _closer(
        self, state: SQPState, evaluation: Evaluation, measure: Array, error: Array
    ) -> SQPState:
        """The same point again, more accurately."""
        target = 0.1 * jnp.maximum(measure - error, self._tolerance(state))
        factor = jnp.clip(target / error, 1e-3, 0.5)
        request = jax.tree.map(jnp.minimum, evaluation.achieved * factor, state.request * 0.5)
        return _replace(state, request=request, refinements=state.refinements + 1)

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
        passes = (kind == FULL) & (state.relaxed < self.patience) & (told.size <= 1e4 * ref.size)
        passes = passes & jnp.isfinite(merit) & ~accepted
        state = _replace(
            state,
            first_merit=jnp.where((kind == FULL) & (state.relaxed == 0), merit, state.first_merit),
        )

        def go_on() -> SQPState:
            moved = _replace(
                state,
                relaxed=jnp.where(passes, state.relaxed + 1, 0),
                # A step that only passes for now has not shown that it was one.
                caution=jnp.where(accepted & (kind != LOOK), 0, state.caution),
                iterations=state.iterations + (kind != LOOK),
            )
            return self._plan(moved, evaluation, told, merit)

        return jax.lax.cond(accepted | passes, go_on, lambda: self._refused(state, merit))

    def _refused(self, state: SQPState, merit: Array) -> SQPState:
        """A shorter step: the plain one after a long one, else one from the reference."""
        kind, ref = state.kind, state.ref
        from_full = (kind == FULL) & (state.relaxed > 0)
        value = jnp.where(from_full, state.first_merit, merit)
        length = jnp.where(kind == BACK, state.step, 1.0)
        drop = value - ref.merit - length * ref.descent
        parabola = -ref.descent * length / (2 * drop)
        factor = jnp.where(jnp.isfinite(value), jnp.clip(parabola, 0.1, 0.5), 0.1)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.5)
        step = length * factor
        trials = state.trials + 1
        shorter = _replace(
            state,
            step=jnp.where(kind == LONG, 1.0, step).astype(state.step.dtype),
            kind=jnp.where(kind == LONG, FULL, BACK).astype(jnp.int32),
            relaxed=jnp.where(kind == LONG, state.relaxed, 0),
            trials=jnp.where(kind == LONG, 0, trials),
        )
        reach = jnp.max(jnp.abs(step * ref.at.d) / (1 + jnp.abs(ref.at.x)), initial=0)
        over = (kind != LONG) & ((trials > self.max_trials) | (reach < jnp.finfo(step.dtype).eps))
        # Begin again from the reference, more cautiously; three times is enough.
        again = _replace(
            state,
            now=ref.at,
            kind=jnp.array(LOOK, jnp.int32),
            caution=state.caution + 1,
            relaxed=jnp.zeros_like(state.relaxed),
            trials=jnp.zeros_like(state.trials),
        )
        hopeless = state.caution >= 3
        again = _finish_if(
            again,
            hopeless,
            Status.where(state.blocked > 0, Status.infeasible, Status.stalled),
        )
        return select(over, again, shorter)

    # -- the next step ----------------------------------------------------------------------------

    def _plan(self, state: SQPState, evaluation: Evaluation, told: Told, merit: Array) -> SQPState:
        """Solve the quadratic program, set the penalties, and choose the next trial."""
        system = self._system(state, evaluation, told.y)
        linear = self._linear(system)
        hessian = system.hessian
        if isinstance(linear, DenseKKT) and state.secant is None:
            hessian = Matrix(jax.vmap(hessian)(jnp.eye(told.x.size, dtype=told.x.dtype)))
        dtype, rows, y = told.x.dtype, told.rows, told.y
        fresh = state.relaxed == 0
        secant = self._updated(state, told)
        state = _replace(state, secant=secant)
        hessian = hessian if secant is None else Matrix(secant)
        system = dataclasses.replace(told.system, hessian=hessian)
        working = rows.active(rows.values + y)
        size = jnp.minimum(told.size, jnp.sqrt(jnp.sum(told.slope**2) + jnp.sum(told.left**2)))
        gentle = jnp.minimum(1e-8, 1e-4 * size)
        gentle = jnp.where(gentle > 0, gentle, 1e-12)
        if system.preconditioner is not None:
            gentle = jnp.zeros_like(gentle)
        relative = jnp.minimum(self.forcing, jnp.sqrt(told.size / state.scale))
        largest = 1e3 * (1 + jnp.linalg.norm(y) + jnp.linalg.norm(told.g))

        # Where nothing is known of the curvature a step is ten times as long as x at most.
        floor = size / (10 * jnp.maximum(1, jnp.linalg.norm(told.x)))

        image = None if system.preconditioner is None else jax.tree.map(jnp.negative, told.z)

        def attempt(carry: tuple) -> tuple:
            _, weight, tries, spent, _, _, _ = carry
            caution = state.caution + jnp.maximum(tries - 1, 0)
            shift = jnp.where(caution > 0, floor * jnp.asarray(10, dtype) ** caution, 0)
            expected = jnp.where(tries == 0, working, rows.equal)
            prepared = linear.prepare(system, expected, floor, shift)
            step = quadratic_step(
                linear,
                prepared,
                system,
                told.g,
                rows,
                y,
                jnp.full_like(y, weight),
                working,
                only_equalities=system.preconditioner is not None,
                relative=relative * jnp.asarray(0.01, dtype) ** tries,
                image=image,
            )
            small = jnp.linalg.norm(step.e) <= largest
            eta, descent, falls = self._penalties(state, system, told, step)
            good = step.good & small & (falls | ~fresh)
            weight = jnp.where(small, weight, 100 * jnp.maximum(weight, 1e-8))
            return step, weight, tries + 1, spent + step.spent, good, eta, descent

        nothing = jax.eval_shape(
            attempt, (None, gentle, jnp.array(0), Work(), jnp.array(False), state.eta, merit)
        )[0]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
        begin = (blank, gentle, jnp.array(0), Work(), jnp.array(False), state.eta, merit)
        going = lambda carry: ~carry[4] & (carry[2] < 5)  # noqa: E731
        step, _, _, spent, _, eta, descent = jax.lax.while_loop(going, attempt, begin)
        descent = jnp.where(jnp.isfinite(descent), descent, -jnp.inf)

        step = dataclasses.replace(step, d=self._within_bounds(state, told, step))
        now = Iterate(told.x, y, step.d, step.e, told.slope, system.transposed(step.e))
        eta = jnp.where(fresh, eta, state.eta)
        merit = self._merit(_replace(state, eta=eta), told)
        ref = select(fresh, Reference(now, merit, descent, told.size), state.ref)
        # Steps that shrink steadily along one line, as Newton's do where the problem is degenerate,
        # are extrapolated to where they lead.
        before, length = state.now.d, jnp.linalg.norm(step.d)
        ratio = length / jnp.linalg.norm(before)
        along = jnp.dot(step.d, before) >= 0.98 * length * jnp.linalg.norm(before)
        longer = along & (ratio > 0.6) & (ratio < 0.9) & state.steady & jnp.all(rows.equal)
        # Linearized constraints that cannot be met any better, again and again, cannot be met.
        v = rows.values - rows.within(rows.values)
        after = rows.values + system.rows(step.d)
        after = after - rows.within(after)
        stays = jnp.linalg.norm(after) >= 0.999 * jnp.linalg.norm(v)
        violated = jnp.max(jnp.abs(v), initial=0) > self.feasible_at
        blocked = jnp.where(fresh, jnp.where(stays & violated, state.blocked + 1, 0), state.blocked)
        planned = _replace(
            state,
            now=now,
            ref=ref,
            eta=eta,
            step=jnp.where(longer, 1 / (1 - ratio), 1.0).astype(dtype),
            kind=jnp.where(longer, LONG, FULL).astype(jnp.int32),
            trials=jnp.zeros_like(state.trials),
            blocked=blocked,
            steady=(state.kind == FULL) | (state.kind == LOOK),
            refinements=jnp.zeros_like(state.refinements),
            spent=state.spent + spent,
        )
        return _finish_if(planned, (blocked >= 4) & fresh, Status.infeasible)

    def _within_bounds(self, state: SQPState, told: Told, step: Step) -> Float[Array, " n"]:
        """The step, up to a bound to the last bit where the quadratic program ends there: its
        stabilization leaves a little."""
        if not state.bounded:
            return step.d
        n, box = told.x.size, state.box
        active, z = step.active[-n:], (told.y + step.e)[-n:]
        d = jnp.where(active & (z < 0) & jnp.isfinite(box.lower), box.lower - told.x, step.d)
        d = jnp.where(active & (z > 0) & jnp.isfinite(box.upper), box.upper - told.x, d)
        return box.clip(told.x + d) - told.x

    def _penalties(
        self, state: SQPState, system: KKTSystem, told: Told, step: Step
    ) -> tuple[Float[Array, "2"], Float[Array, ""], Bool[Array, ""]]:
        """Penalties for which the step descends, the descent, and whether it does."""
        slope, rows, y = told.slope, told.rows, told.y
        ad = system.rows(step.d)
        change = system.hessian(step.d) + system.transposed(step.e)
        kkt = jnp.dot(told.z[0], change)
        along = jnp.dot(slope, step.d) - jnp.dot(y, ad)
        if state.secant is not None:
            kkt = jnp.zeros_like(kkt)

        def descent(eta: Array) -> tuple[Array, Array]:
            if system.preconditioner is not None:
                left, weighted = told.left, told.z[1]
            else:
                left = rows.values - rows.within(rows.values + y / eta[0])
                weighted = left
            first = along + jnp.dot(y + eta[0] * weighted, ad) + jnp.dot(left, step.e)
            size = jnp.dot(slope, told.z[0]) + jnp.dot(left, weighted)
            wanted = 0.5 * eta[1] * size if state.secant is None else 0.25 * step.curvature
            return first + eta[1] * kkt, -wanted

        def wrong(carry: tuple) -> Bool[Array, ""]:
            eta, tries = carry
            value, wanted = descent(eta)
            return ~(value <= wanted) & (tries < 12)

        def raise_(carry: tuple) -> tuple:
            eta, tries = carry
            return eta * jnp.array([2.25, 1 / 1.5], eta.dtype), tries + 1

        eta, _ = jax.lax.while_loop(wrong, raise_, (state.eta, jnp.array(0)))
        value, wanted = descent(eta)
        falls = value <= wanted
        return jnp.where(falls, eta, state.eta), descent(jnp.where(falls, eta, state.eta))[0], falls

    def _updated(self, state: SQPState, told: Told) -> Float[Array, "n n"] | None:
        """The BFGS matrix after a step, damped so that it stays positive definite (Powell)."""
        if state.secant is None:
            return None
        base = select(state.kind == BACK, state.ref.at, state.now)
        s = told.x - base.x
        change = told.slope - (base.slope + state.step * base.change)
        b = state.secant
        bs = b @ s
        sbs, sy = jnp.dot(s, bs), jnp.dot(s, change)
        first = (state.iterations <= 1) & (sy > 0)
        # Before the first update the identity takes the curvature just seen.
        scale = jnp.where(first, jnp.dot(change, change) / jnp.where(sy != 0, sy, 1), 1.0)
        b = jnp.where(first, scale * jnp.eye(s.size, dtype=s.dtype), b)
        bs, sbs = b @ s, jnp.dot(s, b @ s)
        theta = jnp.where(sy >= 0.2 * sbs, 1.0, 0.8 * sbs / (sbs - sy))
        r = theta * change + (1 - theta) * bs
        sr = jnp.dot(s, r)
        new = b - jnp.outer(bs, bs) / sbs + jnp.outer(r, r) / sr
        usable = (state.kind != LOOK) & (sbs > 0) & (sr > 0) & jnp.all(jnp.isfinite(new))
        return jnp.where(usable, new, b)


def _replace(state: SQPState, **changes: Any) -> SQPState:
    return dataclasses.replace(state, **changes)


def _finish_if(state: SQPState, condition: Array, status: Any) -> SQPState:
    ends = condition & ~state.done
    return _replace(state, done=state.done | ends, status=Status.where(ends, status, state.status))
