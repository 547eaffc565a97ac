"""The next step of sequential quadratic programming: the quadratic program, the penalties for which
its solution descends, and the trial that is made of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tolerax.contracts import Evaluation, Work
from tolerax.inner.kkt import DenseKKT, KKTSolver, KKTSystem, KrylovKKT, Matrix
from tolerax.solvers._common import select
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
from tolerax.solvers._subproblem import Step, quadratic_step
from tolerax.status import Status

#: Above this many unknowns and rows matrices are no longer formed.
DENSE_UP_TO = 1000


def linear_solver(solver: Any, system: KKTSystem) -> KKTSolver:
    """The solver of KKT systems that was given, or that fits the size."""
    if solver.linear is not None:
        return solver.linear
    large = sum(system.count) > DENSE_UP_TO
    return KrylovKKT() if large or system.preconditioner is not None else DenseKKT()


def plan(
    solver: Any, state: SQPState, evaluation: Evaluation, told: Told, merit: Array
) -> SQPState:
    """Solve the quadratic program, set the penalties, and choose the next trial."""
    system = system_of(state, evaluation, told.y)
    linear = linear_solver(solver, system)
    hessian = system.hessian
    if isinstance(linear, DenseKKT) and state.secant is None:
        hessian = Matrix(jax.vmap(hessian)(jnp.eye(told.x.size, dtype=told.x.dtype)))
    dtype, rows, y = told.x.dtype, told.rows, told.y
    fresh = state.relaxed == 0
    secant = _updated(state, told)
    state = replace(state, secant=secant)
    hessian = hessian if secant is None else Matrix(secant)
    system = dataclasses.replace(told.system, hessian=hessian)
    working = rows.active(rows.values + y)
    size = jnp.minimum(told.size, jnp.sqrt(jnp.sum(told.slope**2) + jnp.sum(told.left**2)))
    gentle = jnp.minimum(1e-8, 1e-4 * size)
    gentle = jnp.where(gentle > 0, gentle, 1e-12)
    if system.preconditioner is not None:
        gentle = jnp.zeros_like(gentle)
    relative = jnp.minimum(solver.forcing, jnp.sqrt(told.size / state.scale))
    # The last step need not be better than what is asked for.
    enough = 0.1 * (solver.atol + solver.rtol * state.scale) / told.size
    relative = jnp.maximum(relative, jnp.minimum(enough, 0.1))
    unit = 1 + jnp.linalg.norm(y) + jnp.linalg.norm(told.g)
    reach = 1e3 * jnp.maximum(1, jnp.linalg.norm(told.x))
    v = rows.values - rows.within(rows.values)
    pull = jnp.linalg.norm(system.transposed(v))
    pull = pull / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(dtype).tiny)
    if system.preconditioner is not None:
        # Only its own norm says what is long there.
        pull, reach = jnp.zeros_like(pull), jnp.full_like(pull, jnp.inf)

    # Where nothing is known of the curvature a step is ten times as long as x at most.
    floor = size / (10 * jnp.maximum(1, jnp.linalg.norm(told.x)))

    image = None if system.preconditioner is None else jax.tree.map(jnp.negative, told.z)

    def attempt(carry: tuple) -> tuple:
        _, weight, tries, spent, _, _, _, wrong, stretched = carry
        caution = state.caution + jnp.maximum(wrong - 1, 0)
        damped = (caution > 0) | stretched
        shift = jnp.where(damped, floor * jnp.asarray(10, dtype) ** caution, 0)
        expected = jnp.where(wrong == 0, working, rows.equal)
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
            relative=relative * jnp.asarray(0.01, dtype) ** wrong,
            image=image,
        )
        # Multipliers that are large and do not pull at x answer to linearized constraints that
        # contradict each other.
        long = jnp.linalg.norm(step.e)
        idle = jnp.linalg.norm(system.transposed(step.e)) < 0.01 * pull * long
        small = long <= jnp.where(idle, 10, 1e3) * unit
        # Constraints with next to no slope are linear only for a small part of such a step.
        stretches = jnp.linalg.norm(step.d) > reach
        small = small & ~stretches
        bend, turn, bending = _bend(state, evaluation, linear, prepared, step, y, weight)
        eta, descent, falls = _penalties(state, system, told, step)
        good = step.good & small & (falls | ~fresh)
        # Where constraints have lost their slope no multiplier meets them: with a weight near
        # 1 / eta_1 the step is Newton's on the augmented Lagrangian, which descends.
        weight = jnp.where(small & (wrong < 1), weight, 100 * jnp.maximum(weight, 1e-8))
        wrong = wrong + small
        stretched = stretched | stretches
        spent = spent + step.spent + bending
        found = step, bend, turn
        return found, weight, tries + 1, spent, good, eta, descent, wrong, stretched

    none, no = jnp.array(0), jnp.array(False)
    begin = (gentle, none, Work(), no, state.eta, merit, none, no)
    nothing = jax.eval_shape(attempt, (None, *begin))[0]
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
    begin = (blank, *begin)
    going = lambda carry: ~carry[4] & (carry[2] < 8) & (carry[7] < 5)  # noqa: E731
    found, _, _, spent, _, eta, descent, *_ = jax.lax.while_loop(going, attempt, begin)
    step, bend, turn = found
    descent = jnp.where(jnp.isfinite(descent), descent, -jnp.inf)

    step = dataclasses.replace(step, d=_within_bounds(state, told, step))
    change = system.transposed(step.e)
    now = Iterate(told.x, y, step.d, step.e, told.slope, change, bend, turn)
    eta = jnp.where(fresh, eta, state.eta)
    merit = merit_of(replace(state, eta=eta), told)
    ref = select(fresh, Reference(now, merit, descent, told.size), state.ref)
    # Steps that shrink steadily along one line, as Newton's do where the problem is degenerate,
    # are extrapolated to where they lead; where a root is double they halve, or with a bend leave
    # three eighths. Where that has been wrong twice they only look alike.
    one = jnp.ones((), dtype)
    before, move = state.now.along(one), now.along(one)
    length = jnp.linalg.norm(move)
    ratio = length / jnp.linalg.norm(before)
    along = jnp.dot(move, before) >= 0.98 * length * jnp.linalg.norm(before)
    longer = along & (ratio > 0.35) & (ratio < 0.9) & state.steady & jnp.all(rows.equal)
    longer = longer & (state.overshot < 2)
    # Linearized constraints that cannot be met any better, again and again, cannot be met.
    after = rows.values + system.rows(step.d)
    after = after - rows.within(after)
    stays = jnp.linalg.norm(after) >= 0.999 * jnp.linalg.norm(v)
    violated = jnp.max(jnp.abs(v), initial=0) > solver.feasible_at
    blocked = jnp.where(fresh, jnp.where(stays & violated, state.blocked + 1, 0), state.blocked)
    planned = replace(
        state,
        now=now,
        ref=ref,
        eta=eta,
        step=jnp.where(longer, 1 / (1 - ratio), now.reach).astype(dtype),
        kind=jnp.where(longer, LONG, FULL).astype(jnp.int32),
        trials=jnp.zeros_like(state.trials),
        blocked=blocked,
        steady=((state.kind == FULL) & (state.step == 1)) | (state.kind == LOOK),
        refinements=jnp.zeros_like(state.refinements),
        spent=state.spent + spent,
    )
    return _where_blocked(solver, planned, evaluation, told, v, (blocked >= 4) & fresh)


def _bend(
    state: SQPState,
    evaluation: Evaluation,
    linear: KKTSolver,
    prepared: Any,
    step: Step,
    y: Float[Array, " m"],
    weight: Float[Array, ""],
) -> tuple[Float[Array, " n"], Float[Array, ""], Work]:
    """The b for which active rows follow x + t d + t^2 b to second order, `A b = -d'c''d / 2`, the
    length t at which it is half of the step, and what it took.

    Second derivatives of constraints are there anyway, and where matrices are factored this is next
    to free: so much of a second-order correction costs no look at a further point.
    """
    none = jnp.zeros_like(step.d), jnp.array(jnp.inf, step.d.dtype), Work()
    curved = y.size > (step.d.size if state.bounded else 0)
    if not curved or state.secant is not None or not isinstance(linear, DenseKKT):
        return none

    def along(y: Array) -> Array:
        return jnp.dot(step.d, system_of(state, evaluation, y).hessian(step.d))

    right = jnp.where(step.active, -0.5 * jax.grad(along)(y), 0)
    zero = jnp.zeros_like(step.d)
    found = linear.solve(prepared, step.active, jnp.full_like(y, weight), zero, right, relative=0.0)
    finite = jnp.all(jnp.isfinite(found.d))
    bend = jnp.where(finite, found.d, 0)
    size = jnp.linalg.norm(bend)
    half = 0.5 * jnp.linalg.norm(step.d)
    turn = jnp.where(size > 0, half / jnp.where(size > 0, size, 1), jnp.inf)
    return bend, turn, Work(hessian_products=1, linear_iterations=1)


def _where_blocked(
    solver: Any,
    state: SQPState,
    evaluation: Evaluation,
    told: Told,
    v: Float[Array, " m"],
    ends: Bool[Array, ""],
) -> SQPState:
    """The end where the violation v cannot be made less; but where it bends down along some
    direction, as at its maximum and at saddles, a new start there, three times at most."""
    linear = linear_solver(solver, told.system)
    if state.secant is not None or not isinstance(linear, DenseKKT):
        return finish_if(state, ends, Status.infeasible)
    n, rows, box = told.x.size, told.rows, state.box
    eye, none = jnp.eye(n, dtype=told.x.dtype), jnp.zeros_like(told.x)

    def lowest() -> tuple[Array, Array]:
        """The least curvature of `|v|^2 / 2` beside the largest, and a step along it, as long as it
        takes for the violation to vanish there to second order."""
        margin = solver.feasible_at
        near = (rows.values - rows.lower <= margin) | (rows.upper - rows.values <= margin)
        near = near.at[v.size - n :].set(False) if state.bounded else near
        jacobian = jax.vmap(told.system.rows)(eye) * near[None]
        curved, plain = (
            jax.vmap(system_of(state, evaluation, y).hessian)(eye) for y in (v, jnp.zeros_like(v))
        )
        slope = told.system.transposed(v)
        free = ~box.blocked(told.x, slope)
        total = (jacobian @ jacobian.T + curved - plain) * (free[:, None] & free[None])
        values, vectors = jnp.linalg.eigh(0.5 * (total + total.T))
        way = vectors[:, 0] * jnp.where(jnp.dot(slope, vectors[:, 0]) > 0, -1, 1)
        length = jnp.linalg.norm(v) / jnp.sqrt(jnp.abs(values[0]))
        return values[0] / jnp.max(jnp.abs(values)), length * way

    least, way = jax.lax.cond(ends, lowest, lambda: (none[0], none))
    looked = Work(hessian_products=jnp.where(ends, 2 * n, 0))
    state = replace(state, spent=state.spent + looked)
    bends = ends & (least < -1e-6) & jnp.all(jnp.isfinite(way))
    state = finish_if(state, ends & ~bends, Status.infeasible)
    state = finish_if(state, ends & (state.escapes >= 3), Status.stalled)
    away = replace(
        state,
        now=dataclasses.replace(state.now, x=box.clip(told.x + way)),
        kind=jnp.array(LOOK, jnp.int32),
        blocked=jnp.zeros_like(state.blocked),
        escapes=state.escapes + 1,
    )
    return select(bends & ~state.done, away, state)


def _within_bounds(state: SQPState, told: Told, step: Step) -> Float[Array, " n"]:
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
    state: SQPState, system: KKTSystem, told: Told, step: Step
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


def _updated(state: SQPState, told: Told) -> Float[Array, "n n"] | None:
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
