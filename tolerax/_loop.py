"""The compiled loop: ask, evaluate and tell, with the best point, the history and the status."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from tolerax._live import report_from_compiled
from tolerax._packing import Table, choose, packing
from tolerax.contracts import (
    Accuracy,
    Evaluation,
    Problem,
    Query,
    Solver,
    Start,
    Work,
    tree_all_finite,
)
from tolerax.inner.particles import by_blocks, first_differentiated, in_parts
from tolerax.solution import Best, History, Run, empty_history
from tolerax.status import PointStatus, Status, is_failed, is_success
from tolerax.validation import bounds_like

MIN_HISTORY, MAX_HISTORY = 64, 4096


def room(rows: int) -> int:
    """The size of the buffers of the history: a power of two, so that runs of similar length share
    their compilation."""
    return min(max(MIN_HISTORY, 1 << (rows - 1).bit_length()), MAX_HISTORY)


def begin(
    problem: Problem,
    solver: Solver,
    x0: PyTree,
    bounds: tuple[PyTree, PyTree] | None,
    key: PRNGKeyArray,
    max_steps: int,
) -> Run:
    """The run before its first question, with a history for `max_steps` answers."""
    size = room(max_steps + 1)
    return _begin(problem, solver, x0, bounds, key, size, -(-(max_steps + 1) // size))


# What a run may be limited in, in this order: one program serves all limits.
KINDS = ("units", *Work.__dataclass_fields__)
Limits = Int[Array, " kinds"]


@eqx.filter_jit
def _begin(
    problem: Problem,
    solver: Solver,
    x0: PyTree,
    bounds: tuple[PyTree, PyTree] | None,
    key: PRNGKeyArray,
    size: int,
    stride: int,
) -> Run:
    carry = problem.cold_start()

    def answer(query: Query) -> PyTree:
        return eqx.filter_eval_shape(problem.evaluate, query)

    limits = problem.constraint_bounds
    if limits is not None:
        nothing = jnp.zeros(())
        first = answer(Query(x0, Accuracy(nothing, nothing), carry, derivatives=0))
        limits = bounds_like(
            limits, first.constraints, name="constraint_bounds", of="the constraints"
        )
    finite, possible = tree_all_finite(x0), jnp.array(True)
    if bounds is not None:
        # What is traced cannot be refused before the run: x0 is moved into its bounds, and bounds
        # that nothing satisfies end it.
        ordered = jax.tree.map(lambda low, high: jnp.all(low <= high), *bounds)
        possible = jnp.all(jnp.stack(jax.tree.leaves(ordered)))
        x0 = jax.tree.map(jnp.clip, x0, *bounds)
    state = solver.init(Start(x0, bounds, carry, key, answer, limits))
    dtype = jax.tree.leaves(x0)[0].dtype
    inf = jnp.array(jnp.inf, dtype)
    # A solver asks for the same derivatives throughout, so the shape of the best point is known.
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x0)
    first = solver.ask(state)
    gradient = nothing if first.derivatives else None
    if problem.host:
        eqx.filter_eval_shape(
            evaluated, problem, first
        )  # a problem that cannot give what is asked says so before it is called
    best = Best(x0, inf, inf, gradient, inf, inf, inf, carry)
    history = empty_history(size, stride, dtype, solver.record(state))
    zero = jnp.array(0, jnp.result_type(int))
    status = Status.where(finite, Status.running, Status.non_finite_start)
    status = Status.where(possible, status, Status.infeasible)
    false = jnp.array(False)
    return Run(state, best, inf, Work(), history, zero, zero, status, false, Status.running, bounds)


def resumable(run: Run) -> Run:
    """A run that ended for a limit goes on; one that ended for a reason of its own stays ended."""
    limited = (run.status == Status.budget) | (run.status == Status.time)
    limited = limited | (run.status == Status.stopped) | (run.status == Status.worker_lost)
    status = Status.where(limited, Status.running, run.status)
    return eqx.tree_at(lambda r: r.status, run, status)


def extended(run: Run, rows: int) -> Run:
    """The run with room for `rows` more rows of history, as far as `MAX_HISTORY` allows: as much as
    one long run would have."""
    history = run.history
    size = history.value.shape[0]
    need = room(-(-(int(run.step) + rows + 1) // history.stride))
    if need <= size:
        return run

    def longer(column: Array) -> Array:
        return jnp.concatenate([column, _blank(column, need - size)])

    columns, count = _columns(history)
    return eqx.tree_at(lambda r: r.history, run, eqx.combine(jax.tree.map(longer, columns), count))


def with_history(run: Run, size: int, stride: int) -> Run:
    """A run that has not begun with buffers of another size for the history."""
    columns, count = _columns(dataclasses.replace(run.history, stride=stride))
    columns = jax.tree.map(lambda column: _blank(column, size), columns)
    return eqx.tree_at(lambda r: r.history, run, eqx.combine(columns, count))


def _columns(history: History) -> tuple[History, History]:
    return eqx.partition(history, lambda leaf: eqx.is_array(leaf) and leaf.ndim == 1)


def _blank(column: Array, size: int) -> Array:
    fill = jnp.nan if jnp.issubdtype(column.dtype, jnp.floating) else 0
    return jnp.full(size, fill, column.dtype)


def ask(solver: Solver, run: Run, limits: Limits) -> Query:
    """The solver's query, as far as its points are within the limits, or, when it claims success,
    the best point again."""
    query = solver.ask(run.solver_state)
    if query.mask is None:
        again_x, again_mask = run.best.x, None
        again_carry = run.best.carry if query.carry is not None else None
    else:
        # In the place of the first of the points: in that of all it would take their memory again.
        # Not by `q.at[0].set`: XLA (jaxlib 0.10) scatters the row to the first row of every device
        # where the first points have just been exchanged, as `CBO` does.
        def first(q: Array, b: Array) -> Array:
            row = jnp.where(run.verifying, b, q[0])
            return jax.lax.dynamic_update_index_in_dim(q, row, 0, 0)

        again_x, again_carry = jax.tree.map(first, query.x, run.best.x), query.carry
        again_mask = jnp.zeros_like(query.mask).at[0].set(True)
        if again_carry is not None:
            again_carry = jax.tree.map(first, again_carry, run.best.carry)
        mask = _affordable(run, query.mask, limits)
        query = dataclasses.replace(query, x=again_x, carry=again_carry, mask=mask)
    cutoff = None if query.cutoff is None else jnp.full_like(query.cutoff, jnp.inf)
    effort = query.effort
    if effort is not None:
        effort = jnp.full_like(effort, jnp.iinfo(effort.dtype).max)
    again = dataclasses.replace(
        query, x=again_x, carry=again_carry, mask=again_mask, cutoff=cutoff, effort=effort
    )
    return jax.tree.map(lambda a, q: jnp.where(run.verifying, a, q), again, query)


def evaluated(problem: Problem, query: Query) -> Evaluation:
    """The answer of a problem."""
    if query.first_only:
        return first_differentiated(problem, query)
    # Python code gets its points one by one, wherever particles lie.
    if problem.host or query.sharding is None:
        return in_parts(problem, query)
    return by_blocks(problem, query)


def _affordable(run: Run, mask: Array, limits: Limits) -> Array:
    """The first points of a batch that can be evaluated before a limit is reached."""
    rank = jnp.cumsum(mask)
    # What a point costs is known beforehand only where points are what is counted.
    for name in ("points", "values", "units"):
        count = getattr(run.work, name)
        over = rank > limits[KINDS.index(name)] - count
        mask = mask & ~(over & (count == run.work.points))
    return mask


def tell(solver: Solver, run: Run, query: Query, evaluation: Evaluation) -> Run:
    """The run after an answer, with the best point, the history and the status brought up."""
    if evaluation.violation is not None and not solver.honours_constraints:
        raise ValueError(
            f"{type(solver).__name__} does not look at constraints, but the points of this problem "
            "have a `violation`: use a solver that does, for instance `CBO`."
        )
    checked = _check_claim(solver, run, query, evaluation)
    shown = _candidate(solver, query, evaluation, run)
    told = solver.tell(run.solver_state, query, evaluation)
    keep = run.verifying
    state = choose(keep, run.solver_state, told)
    done, outcome = solver.terminate(state)
    claims = done & is_success(outcome) & ~keep
    own = jax.tree.map(jnp.subtract, solver.work(state), solver.work(run.solver_state))
    floor = done & (outcome == Status.accuracy_floor) & ~keep
    run = _note(solver, run, query, evaluation, shown, own, claims | floor)
    # What a solver has forgotten has not failed.
    forgot = (outcome == Status.all_failed) & (run.best.value < jnp.inf)
    outcome = Status.where(forgot, Status.stalled, outcome)
    ended = Status.where(done & ~claims, outcome, Status.running)
    status = Status.where(keep, checked, ended)
    # No solver has to look for these: a value of minus infinity, or far below anything seen, has no
    # minimum to find, and nothing that rests on a constant that does not hold can be believed.
    low = -(1 + run.scale) * jnp.finfo(run.scale.dtype).eps ** -1.5
    feasible = run.best.violation <= solver.feasibility
    bottomless = (run.best.value <= low) & (feasible | (run.best.value == -jnp.inf))
    contradicted = evaluation.status == PointStatus.contradicted
    contradicted = jnp.any(contradicted if query.mask is None else contradicted & query.mask)
    status = Status.where(bottomless, Status.unbounded, status)
    status = Status.where(contradicted, Status.contradicted, status)
    claims = claims & ~bottomless & ~contradicted
    status = Status.where(run.status == Status.running, status, run.status)
    claim = Status.where(claims, outcome, run.claim)
    history = _record(run, query, evaluation, shown[0], solver.record(state))
    return Run(
        state,
        run.best,
        run.scale,
        run.work,
        history,
        run.step + 1,
        run.failures,
        status,
        claims,
        claim,
        run.bounds,
    )


def _note(
    solver: Solver,
    run: Run,
    query: Query,
    evaluation: Evaluation,
    shown: tuple[Best, Array],
    own: Work,
    meant: Array,
) -> Run:
    """Add the work, also the solver's own, and keep the best point: with constraints the one that
    is `meant` where the solver ends with it."""
    candidate, usable = shown
    failed = is_failed(evaluation.status)
    failed = jnp.sum(failed if query.mask is None else failed & query.mask)
    best = run.best
    slack = 4 * jnp.finfo(best.value.dtype).eps * jnp.abs(best.value)
    slack = jnp.where(jnp.isfinite(slack), slack, 0.0)
    upper, best_upper = candidate.value + candidate.value_error, best.value + best.value_error
    lower = upper < best_upper
    # Among points whose values cannot be told apart the smaller gradient is the better one.
    tie = (upper <= best_upper + slack) & (candidate.gradient_norm < best.gradient_norm)
    feasible = candidate.violation <= solver.feasibility
    both = feasible & (best.violation <= solver.feasibility)
    better = jnp.where(both, lower | tie, candidate.violation < best.violation)
    if evaluation.violation is not None and query.mask is None:
        # A little infeasibility buys a lower value: the solver says which point it means.
        better = better | (meant & feasible)
    # A second look at the best point replaces what is known about it.
    better = (better | run.verifying) & usable
    best = choose(better, candidate, best)
    failures = run.failures + failed.astype(run.failures.dtype)
    first = (run.scale == jnp.inf) & jnp.isfinite(best.value)
    scale = jnp.where(first, jnp.abs(best.value), run.scale)
    where = lambda r: (r.best, r.scale, r.work, r.failures)  # noqa: E731
    return eqx.tree_at(where, run, (best, scale, run.work + evaluation.work + own, failures))


def _candidate(
    solver: Solver, query: Query, evaluation: Evaluation, run: Run
) -> tuple[Best, Bool[Array, ""]]:
    """The best point of an answer as a `Best`, and whether its value says anything."""
    best = run.best
    dtype = best.value.dtype
    value, error = evaluation.value.astype(dtype), evaluation.value_error.astype(dtype)
    error = jnp.where(jnp.isnan(error), jnp.inf, error)
    violation = jnp.zeros_like(value) if evaluation.violation is None else evaluation.violation
    x, carry, gradient = query.x, evaluation.carry, None
    axes = 0 if query.mask is None else 1
    if evaluation.gradient is None:
        norm = jnp.full_like(value, jnp.inf)
    else:
        projected = _projected(query.x, evaluation.gradient, run.bounds)
        metric = evaluation.metric
        representer = projected if metric is None else metric.solve(projected)
        squares = [
            jnp.sum((g * r).astype(dtype), axis=tuple(range(axes, g.ndim)))
            for g, r in zip(jax.tree.leaves(projected), jax.tree.leaves(representer), strict=True)
        ]
        norm = jnp.sqrt(jnp.maximum(sum(squares, jnp.zeros((), dtype)), 0))
    if best.gradient is not None:
        unknown = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x)
        gradient = unknown if evaluation.gradient is None else evaluation.gradient
    gradient_error = evaluation.gradient_error.astype(dtype)
    # The value counts even where the gradient failed; NaN and +inf are no values, -inf is one.
    usable = value + error < jnp.inf
    if query.mask is not None:
        usable = usable & query.mask
        feasible = usable & (violation <= solver.feasibility)
        best_first = jnp.where(feasible, value + error, jnp.inf)
        nearest_first = jnp.where(usable, violation, jnp.inf)
        index = jnp.argmin(jnp.where(jnp.any(feasible), best_first, nearest_first))
        pick = lambda leaf: leaf[index]  # noqa: E731
        x, carry, gradient = jax.tree.map(pick, (x, carry, gradient))
        value, error, violation, norm, gradient_error, usable = map(
            pick, (value, error, violation, norm, gradient_error, usable)
        )
    if jax.tree.structure(carry) != jax.tree.structure(best.carry):
        carry = best.carry
    violation = violation.astype(dtype)
    return Best(x, value, error, gradient, norm, gradient_error, violation, carry), usable


def _projected(x: PyTree, gradient: PyTree, bounds: tuple[PyTree, PyTree] | None) -> PyTree:
    """The gradient without the entries that push against a bound."""
    if bounds is None:
        return gradient

    def free(x: Array, g: Array, lower: Array, upper: Array) -> Array:
        lower, upper = jnp.broadcast_to(lower, x.shape), jnp.broadcast_to(upper, x.shape)
        return jnp.where(((x <= lower) & (g > 0)) | ((x >= upper) & (g < 0)), 0, g)

    return jax.tree.map(free, x, gradient, *bounds)


def _check_claim(solver: Solver, run: Run, query: Query, evaluation: Evaluation) -> Any:
    """The status after the claimed point was evaluated again."""
    if query.mask is not None:
        first = lambda leaf: leaf[0] if eqx.is_array(leaf) and leaf.ndim else leaf  # noqa: E731
        evaluation = jax.tree.map(first, evaluation)
    value, error = evaluation.value, evaluation.value_error
    rounding = 64 * jnp.finfo(run.best.value.dtype).eps * (1.0 + jnp.abs(run.best.value))
    same = jnp.abs(value - run.best.value) <= error + run.best.value_error + rounding
    holds = solver.verify(run.solver_state, evaluation) & same
    again = run.best.violation if evaluation.violation is None else evaluation.violation
    least = jnp.minimum(run.best.violation, again)
    most = jnp.maximum(run.best.violation, again)
    status = Status.where(most <= solver.feasibility, run.claim, Status.infeasible)
    mixed = (least <= solver.feasibility) & (most > solver.feasibility)
    return Status.where(holds & ~mixed, status, Status.not_reproduced)


def _record(
    run: Run, query: Query, evaluation: Evaluation, shown: Best, extra: dict[str, Array]
) -> Any:
    """One more row."""
    accuracy, achieved = query.accuracy, evaluation.achieved
    row = {
        "value": shown.value,
        "value_error": shown.value_error,
        "best_value": run.best.value,
        "gradient_norm": shown.gradient_norm,
        "gradient_error": shown.gradient_error,
        "state_tolerance": jnp.max(accuracy.state),
        "adjoint_tolerance": jnp.max(accuracy.adjoint),
        "state_error": jnp.max(achieved.state),
        "adjoint_error": jnp.max(achieved.adjoint),
    }
    dtype = run.best.value.dtype
    row = {name: jnp.asarray(entry, dtype) for name, entry in row.items()}
    stride: Any = run.history.stride
    return run.history.add(History(**row, work=run.work, solver=extra, count=None, stride=stride))


def spent(work: Work, limits: Limits) -> Bool[Array, ""]:
    """Whether a limit is reached."""
    return jnp.any(jnp.stack([getattr(work, name) for name in KINDS]) >= limits)


spent_compiled = jax.jit(spent)


@eqx.filter_jit
def advance(
    problem: Problem,
    solver: Solver,
    run: Run,
    last_step: Any,
    limits: Limits,
    meter: Any = None,
) -> Run:
    """Ask, evaluate and tell until the run ends or `last_step` answers have been told."""
    history = run.history
    run = eqx.tree_at(lambda r: r.history, run, Table.of(history))
    arrays, static = eqx.partition(run, eqx.is_array)
    pack, unpack = packing(arrays)

    def unfinished(packed: Any) -> Bool[Array, ""]:
        run = eqx.combine(unpack(packed), static)
        going = (run.status == Status.running) & (run.step < last_step)
        return going & ~spent(run.work, limits)

    def body(packed: Any) -> Any:
        run = eqx.combine(unpack(packed), static)
        query = ask(solver, run, limits)
        run = tell(solver, run, query, evaluated(problem, query))
        if meter is not None:
            report_from_compiled(meter, 20, run.step, scalars(run))
        return pack(eqx.filter(run, eqx.is_array))

    run = eqx.combine(unpack(jax.lax.while_loop(unfinished, body, pack(arrays))), static)
    run = eqx.tree_at(lambda r: r.history, run, run.history.history(history))
    over = (run.status == Status.running) & spent(run.work, limits)
    return eqx.tree_at(lambda r: r.status, run, Status.where(over, Status.budget, run.status))


@eqx.filter_jit
def one(
    problem: Problem, solver: Solver, run: Run, limits: Limits
) -> tuple[Run, Query, Evaluation]:
    query = ask(solver, run, limits)
    evaluation = evaluated(problem, query)
    return tell(solver, run, query, evaluation), query, evaluation


ask_compiled = eqx.filter_jit(ask)
tell_compiled = eqx.filter_jit(tell)


def scalars(run: Run) -> dict[str, Any]:
    return {
        "value": run.best.value,
        "gradient_norm": run.best.gradient_norm,
        "work": run.work.units,
    }
