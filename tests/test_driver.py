"""`solve`: what it refuses, what it returns, and that every way of running it gives the same."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from benchmarks.timing import compilations
from tests.conformance import zoo
from tolerax import Accuracy, Evaluation, Objective, PointStatus, Query, Solver, Status, Work
from tolerax.checkpoint import Checkpoint, CheckpointError
from tolerax.errors import EvaluationError, SolveError
from tolerax.solution import Step

solver = tolerax.HOAG()  # the quickest to compile
START = jnp.asarray(zoo.START)


def bowl():
    return zoo.objective("quadratic")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"problem": zoo.quadratic}, TypeError, r"not a Problem: wrap|violates type hint"),
        ({"solver": "line-search"}, TypeError, "not a Solver|violates type hint"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"max_steps": 2.5}, (ValueError, TypeError), "max_steps"),
        ({"max_work": {"steps": 3}}, ValueError, "key 'steps': use one of units, points"),
        ({"max_work": 0}, ValueError, r"max_work\['units'\] is 0"),
        ({"max_work": {"values": -1}}, ValueError, r"max_work\['values'\] is -1"),
        ({"max_work": True}, ValueError, r"max_work\['units'\] is True"),
        ({"max_work": 100.0}, (ValueError, TypeError), r"max_work\['units'\] is 100.0|max_work"),
        ({"max_seconds": float("nan")}, ValueError, "max_seconds is nan"),
        ({"callback": 3}, TypeError, "callback"),
        ({"checkpoint": 3}, TypeError, "checkpoint"),
        ({"key": 0}, TypeError, "key"),
        ({"key": jnp.zeros(2)}, TypeError, "key"),
        ({"x0": jnp.array([1, 2])}, TypeError, "x0 has dtype int64"),
        ({"x0": jnp.zeros(0)}, ValueError, "x0 is empty"),
        ({"executor": ThreadPoolExecutor}, ValueError, "evaluated by compiled code"),
        ({"progress": "loud"}, (ValueError, TypeError), "progress"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, error, message):
    given = {"problem": bowl(), "solver": solver, "x0": START} | arguments
    with pytest.raises(error, match=message):
        tolerax.solve(**given)


def test_bounds_are_checked_before_the_run():
    outside = Objective(zoo.quadratic, bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"x0 is 4.0 at index \(0,\), outside its bounds"):
        tolerax.solve(outside, solver, START)
    crossed = Objective(zoo.quadratic, bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match="above the upper bound"):
        tolerax.solve(crossed, solver, START)


def test_bounds_are_honoured_inside_jit():
    @jax.jit
    def run(x0, upper):
        # The lower bound is known when this is traced, the upper one is not.
        problem = Objective(zoo.quadratic, bounds=(2.0, upper))
        return tolerax.solve(problem, solver, x0, max_steps=300)

    outside = run(jnp.array([-9.0, 1.0]), 5.0)
    np.testing.assert_allclose(outside.x, [2.0, 2.0])
    assert outside.success
    for upper in (1.0, np.nan):
        assert zoo.name_of(run(jnp.ones(2), upper).status) == "infeasible"
    for bounds, message in (((2.0, 1.0), "above the upper"), ((np.nan, 1.0), "holds NaN")):
        with pytest.raises(ValueError, match=message):
            jax.jit(
                lambda x, b=bounds: tolerax.solve(Objective(zoo.quadratic, bounds=b), solver, x)
            )(START)


def test_throw_raises_with_the_solution_attached():
    with pytest.raises(SolveError, match="Unbounded") as raised:
        zoo.run(zoo.objective("unbounded"), solver, START, throw=True)
    assert zoo.name_of(raised.value.solution.status) == "unbounded"
    assert zoo.run(bowl(), solver, START, throw=True).success


def test_inside_jit_only_what_can_be_compiled_is_allowed():
    def inside(**options):
        return jax.jit(lambda x: zoo.run(bowl(), solver, x, **options).x)(START)

    for option in ({"callback": print}, {"checkpoint": "here"}, {"max_seconds": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} needs the host"):
            inside(**option)
    with pytest.raises(ValueError, match="evaluated by Python code cannot run inside jit"):
        jax.jit(lambda x: zoo.run(zoo.python_objective("quadratic"), solver, x).x)(START)


def test_progress_inside_jit_is_started_and_closed_in_every_call():
    told = []

    class Meter:
        def start(self, total, description):
            told.append(("start", total, description))

        def update(self, step, **scalars):
            told.append(step)

        def close(self, message):
            told.append("close")

    meter = Meter()
    run = jax.jit(lambda x: tolerax.solve(bowl(), solver, x, max_steps=7, progress=meter).x)
    for _ in range(2):
        told.clear()
        jax.block_until_ready(run(START))
        jax.effects_barrier()
        assert told == [("start", 7, "HOAG"), 7, "close"]


@pytest.mark.parametrize("watch", [None, lambda step: None])
def test_what_compiled_code_raises_has_the_best_point_attached(watch, tmp_path):
    def simulate(x):
        if np.sum(x**2) < 4:
            raise ZeroDivisionError("the mesh tangled")
        return np.sum(x**2)

    @jax.custom_jvp
    def fun(x):
        return jax.pure_callback(simulate, jax.ShapeDtypeStruct((), x.dtype), x)

    fun.defjvp(lambda x, v: (fun(*x), 2 * jnp.dot(x[0], v[0])))
    path = Checkpoint(tmp_path / "run")
    with pytest.raises(EvaluationError, match="the mesh tangled") as raised:
        tolerax.solve(Objective(fun), solver, START, callback=watch, checkpoint=path)
    best = raised.value.solution
    assert 4 <= float(best.value) < 16
    assert int(best.steps) == path.manifest()["step"] > 1


def test_an_interrupted_run_is_saved(tmp_path):
    def interrupt(step):
        if step.number == 3:
            raise KeyboardInterrupt

    path = Checkpoint(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        zoo.run(bowl(), solver, START, callback=interrupt, checkpoint=path)
    assert path.manifest()["step"] == 3


def test_inside_jit_limits_and_throw_work():
    @functools.partial(jax.jit, static_argnames=("limit", "throw"))
    def inside(x, limit, throw):
        return zoo.run(bowl(), solver, x, max_work={"points": limit}, throw=throw)

    solution = inside(START, 2, False)
    assert int(solution.steps) == 2
    assert zoo.name_of(solution.status) == "budget"
    with pytest.raises(Exception, match="did not converge"):
        jax.block_until_ready(inside(START, 2, True).x)
    assert inside(START, 100, True).success


def test_compiled_sliced_and_single_steps_agree():
    start = jnp.array([-1.2, 1.0])
    problem = zoo.objective("rosenbrock")
    whole = zoo.run(problem, solver, start)
    sliced = zoo.run(problem, solver, start, max_seconds=3600.0)
    np.testing.assert_array_equal(sliced.x, whole.x)
    assert int(sliced.steps) == int(whole.steps)
    steps: list[Step] = []
    single = zoo.run(problem, solver, start, callback=steps.append)
    # Another program: the same to rounding, which a long run may enlarge.
    np.testing.assert_allclose(single.x, whole.x, atol=1e-6)
    assert [step.number for step in steps] == list(range(1, int(single.steps) + 1))
    assert isinstance(steps[0].evaluation, Evaluation)
    np.testing.assert_array_equal(steps[0].query.x, start)


def test_progress_is_told_and_never_changes_a_run():
    told = []

    class Meter:
        def start(self, total, description):
            told.append(("start", total, description))

        def update(self, step, **scalars):
            told.append((step, scalars))

        def close(self, message):
            told.append("close")

    solution = zoo.run(bowl(), solver, START, progress=Meter())
    assert told[0] == ("start", zoo.STEPS, "HOAG")
    assert told[-1] == "close"
    step, scalars = told[-2]
    assert step == int(solution.steps)
    assert scalars["value"] == float(solution.value)
    np.testing.assert_array_equal(solution.x, zoo.run(bowl(), solver, START).x)


@pytest.mark.parametrize(
    "make",
    [
        lambda number: tolerax.InexactLineSearch(rtol=number, accuracy=Accuracy(number, number)),
        lambda number: tolerax.HOAG(tolerance=number, rtol=number),
        lambda number: tolerax.CBO(particles=8, dt=number, spread=number, tol=number),
    ],
)
def test_other_numbers_do_not_compile_again(make):
    def run(number, steps):
        tolerax.solve(bowl(), make(number), START + number, max_steps=steps, max_work=1000)

    run(1e-2, 3)
    with compilations() as found:
        run(2e-2, 40)
    assert found == []


def test_time_is_checked_between_slices_of_a_compiled_run():
    problem = zoo.objective("rosenbrock")
    began = time.perf_counter()
    solution = tolerax.solve(
        problem, solver, jnp.array([-1.2, 1.0]), max_steps=10**9, max_seconds=0.01
    )
    # To converge takes more than 10,000 steps, and a tenth of a second once compiled.
    assert zoo.name_of(solution.status) == "time"
    assert time.perf_counter() - began < 60
    assert int(solution.steps) >= 1
    assert float(solution.value) <= 24.2


def test_long_runs_keep_every_other_row():
    steps = 10_000  # more than the buffers hold
    problem = zoo.objective("rosenbrock")
    solution = tolerax.solve(problem, solver, jnp.array([-1.2, 1.0]), max_steps=steps)
    history = solution.history
    assert history.stride == 3
    rows = history.rows()
    assert len(rows["value"]) == -(-int(solution.steps) // 3)
    np.testing.assert_array_equal(rows["points"], 1 + 3 * np.arange(len(rows["points"])))
    assert np.all(np.isfinite(rows["value"]))
    assert set(rows) >= {"best_value", "gradient_norm", "state_tolerance", "iteration"}


def test_summary_says_what_is_known():
    text = zoo.run(bowl(), solver, START).summary()
    for part in ("Converged", "value", "(certified)", "gradient", "points", "steps"):
        assert part in text
    problem = zoo.python_objective("quadratic", gradient="3-point")
    text = zoo.run(problem, solver, START).summary()
    assert "(estimated)" in text
    assert "differences: estimated" in text


class Batches(Solver):
    """Asks the same batch once; its history of what it was told is its state."""

    masked: bool = eqx.field(static=True, default=False)

    def init(self, start):
        offsets = jnp.array([[0.0, 0.0], [-3.0, -2.0], [-2.9, -2.0], [1.0, 1.0]])
        return start.x[None] + offsets, jnp.array(0)

    def ask(self, state):
        mask = jnp.array([True, not self.masked, True, True])
        return Query(state[0], Accuracy(1.0, 1.0), mask=mask, derivatives=0)

    def tell(self, state, query, evaluation):
        return state[0], state[1] + 1

    def terminate(self, state):
        return state[1] >= 2, Status.converged

    @property
    def honours_bounds(self):
        return True


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_best_point_of_a_batch(host, masked):
    problem = zoo.python_objective("quadratic") if host else bowl()
    solution = zoo.run(problem, Batches(masked), START)
    np.testing.assert_allclose(solution.x, (1.1, -2.0) if masked else zoo.CENTRE)
    assert solution.success
    assert solution.gradient is None
    assert float(solution.gradient_norm) == np.inf
    # Two batches, then the best point once more.
    assert int(solution.work.points) == 2 * (3 if masked else 4) + 1


def test_failing_points_of_a_batch_are_passed_over():
    def fun(x):
        if x[1] == -2.0:
            raise ArithmeticError
        return zoo.quadratic(x)

    problem = zoo.python_objective("quadratic", fun=fun, on_error="fail")
    solution = zoo.run(problem, Batches(), START)
    np.testing.assert_array_equal(solution.x, START)
    assert int(solution.state.failures) == 4  # points, whatever became of the batch
    never = zoo.python_objective("quadratic", fun=lambda x: np.nan)
    solution = zoo.run(never, Batches(), START)
    assert zoo.name_of(solution.status) == "all_failed"
    assert "evaluations failed" in solution.message
    pit = zoo.python_objective("quadratic", fun=lambda x: -np.inf if x[0] == 5.0 else 1.0)
    solution = zoo.run(pit, Batches(), START)
    assert zoo.name_of(solution.status) == "unbounded"
    np.testing.assert_array_equal(solution.x, [5.0, 1.0])


def test_an_executor_evaluates_the_points_of_a_batch():
    with ThreadPoolExecutor(4) as pool:
        problem = zoo.python_objective("quadratic")
        solution = zoo.run(problem, Batches(), START, executor=pool)
    np.testing.assert_array_equal(solution.x, zoo.CENTRE)


class Sees(tolerax.Problem):
    """A quadratic whose answers have one status from the third point on."""

    status: Any
    bounds: Any

    def __init__(self, status):
        self.status = status
        self.bounds = None

    def cold_start(self):
        return jnp.array(0)

    def evaluate(self, query):
        answer = bowl().evaluate(Query(query.x, query.accuracy))
        status = PointStatus.where(query.carry >= 2, self.status, PointStatus.ok)
        where = lambda e: (e.status, e.carry)  # noqa: E731
        return eqx.tree_at(
            where, answer, (status, query.carry + 1), is_leaf=lambda leaf: leaf is None
        )


def test_a_contradicted_constant_ends_any_run():
    for any_solver in (solver, tolerax.MAID()):
        solution = zoo.run(Sees(PointStatus.contradicted), any_solver, START)
        assert zoo.name_of(solution.status) == "contradicted"
        assert "contradicted" in solution.message
        assert int(solution.steps) == 3


def test_a_value_counts_where_the_gradient_failed():
    problem = zoo.objective("quadratic", fault="nan")
    solution = zoo.run(problem, solver, START)
    assert zoo.name_of(solution.status) == "non_finite_start"
    assert float(solution.value) == 13.0
    assert np.isnan(np.asarray(solution.gradient)).all()


def test_a_key_reaches_the_solver():
    class Random(Batches):
        def init(self, start):
            return start.x[None] + jax.random.normal(start.key, (4, 2)), jnp.array(0)

    one, other, again = (
        zoo.run(bowl(), Random(), START, key=jax.random.key(seed)).x for seed in (1, 2, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(np.asarray(one) != np.asarray(other))


def test_work_of_failed_attempts_is_counted():
    seen = zoo.Recorded(lambda x: np.nan if x[0] < 1.5 else zoo.quadratic(x))
    problem = zoo.python_objective("quadratic", fun=seen)
    solution = zoo.run(problem, solver, START, max_work={"points": 30})
    assert solution.work.as_dict() == Work(points=30, values=30, gradients=30).as_dict()
    assert len(seen.values) == 30
    assert int(solution.state.failures) == int(np.isnan(seen.values).sum())


def test_a_checkpoint_of_another_function_start_or_key_is_refused(tmp_path):
    def run(fun, x0=START, **options):
        path = str(tmp_path / "run")
        return tolerax.solve(Objective(fun), solver, x0, max_steps=2, checkpoint=path, **options)

    functions = [lambda x: jnp.sum(x**2), lambda x: jnp.sum((x - 1) ** 2) + 100]
    first = run(functions[0])
    with pytest.raises(CheckpointError, match="has problem"):
        run(functions[1])
    for changed in ({"x0": START + 1}, {"key": jax.random.key(1)}):
        with pytest.raises(CheckpointError, match="has x0_and_key"):
            run(functions[0], **changed)
    assert int(run(functions[0]).steps) == int(first.steps) == 2


def test_more_steps_continue_a_checkpoint(tmp_path):
    problem, start = zoo.objective("rosenbrock"), jnp.array([-1.2, 1.0])
    path = str(tmp_path / "run")
    tolerax.solve(problem, solver, start, max_steps=10, checkpoint=path)
    rest = zoo.run(problem, solver, start, checkpoint=path)
    whole = zoo.run(problem, solver, start, max_seconds=3600.0)
    np.testing.assert_array_equal(rest.x, whole.x)
    for name, column in whole.history.rows().items():
        np.testing.assert_array_equal(rest.history.rows()[name], column)
