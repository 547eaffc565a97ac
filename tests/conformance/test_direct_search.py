"""What derivative-free solvers that search from a point must do, on compiled and on Python code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.registry import SEARCHES
from tests.conformance.test_runs import stop_at
from tolerax import Status

every = pytest.mark.parametrize("entry", SEARCHES, ids=str)
START = jnp.asarray(zoo.START)


def run(problem, solver, start=START, **options):
    return tolerax.solve(problem, solver, start, **({"max_steps": 600} | options))


def python(fun=zoo.quadratic, bounds=None, **options):
    bounds = bounds or (jnp.full(2, -jnp.inf), jnp.full(2, jnp.inf))
    return tolerax.Objective(fun, bounds=bounds, host=True, **options)


@every
@pytest.mark.parametrize("name", list(zoo.PROBLEMS))
def test_reaches_a_known_minimum(entry, name):
    known = zoo.PROBLEMS[name]
    solution = run(zoo.objective(known.fun, known=known), entry.solver(), jnp.asarray(known.start))
    assert any(solution.status == status for status in entry.statuses), solution.message
    x = np.asarray(solution.x)
    # The valley of Rosenbrock's function has a curvature of 0.4 along it.
    close = entry.close * (1 if "rosenbrock" not in name else 100)
    np.testing.assert_allclose(x, known.minimum, atol=close)
    assert np.all((x >= known.lower) & (x <= known.upper))


@every
def test_never_leaves_the_bounds_and_keeps_its_budget(entry):
    known = zoo.PROBLEMS["bounded"]
    seen = zoo.Recorded(zoo.quadratic)
    problem = python(seen, (jnp.asarray(known.lower), jnp.asarray(known.upper)))
    solution = run(problem, entry.solver(), jnp.asarray(known.start), max_work={"points": 23})
    points = np.array(seen.points)
    assert np.all((points >= known.lower) & (points <= known.upper))
    assert solution.status == Status.budget
    assert len(points) == int(solution.work.points) == 23
    assert float(solution.value) == min(seen.values)
    np.testing.assert_array_equal(solution.x, points[int(np.argmin(seen.values))])


@every
def test_a_budget_smaller_than_one_poll(entry):
    seen = zoo.Recorded(zoo.quadratic)
    solution = run(python(seen), entry.solver(), max_work={"points": 2})
    assert solution.status == Status.budget
    assert len(seen.points) == 2
    assert float(solution.value) == min(seen.values)


@every
def test_coordinates_without_room_stay(entry):
    known = zoo.Known("quadratic", (4.0, -1.0), (1.0, -1.0), (-5.0, -1.0), (5.0, -1.0))
    solution = run(zoo.objective("quadratic", known=known), entry.solver(), jnp.array(known.start))
    np.testing.assert_allclose(solution.x, known.minimum, atol=entry.close)
    assert float(solution.x[1]) == -1.0
    assert any(solution.status == status for status in entry.statuses)


@every
@pytest.mark.parametrize("kind", ["nan_region", "inf_region", "nan_start"])
def test_points_that_fail_cost_nothing_else(entry, kind):
    """Near the edge x[0] = 1.5 of the region without values, where models say little, the best
    value is 0.25; and no success is claimed there."""
    region, values = "region" in kind, []
    for seed in range(5 if region else 1):
        solution = run(zoo.objective(kind), entry.solver(), key=jax.random.key(seed))
        values.append(float(solution.value))
        assert np.isfinite(np.asarray(solution.x)).all()
        assert int(solution.state.failures) > 0
        if region:
            assert not solution.success
    # Polls find the way along the edge by chance.
    assert np.median(values) <= (0.3 if region else 1e-6)
    assert max(values) <= (0.45 if region else 1e-6)


@every
def test_all_failing_is_a_status(entry):
    for name in ("always_nan", "always_inf"):
        solution = run(zoo.objective(name), entry.solver())
        assert solution.status == Status.all_failed
        assert not solution.success


@every
def test_unbounded(entry):
    solution = run(zoo.objective("minus_inf"), entry.solver())
    assert solution.status == Status.unbounded


@every
def test_a_discontinuous_objective_ends_low(entry):
    """Steps of height 1: the run ends on the lowest plateau that it saw, without an error."""
    seen = zoo.Recorded(lambda x: float(np.ceil(zoo.quadratic(x))))
    solution = run(python(seen), entry.solver())
    assert float(solution.value) == min(seen.values) <= 3.0


@every
def test_python_code_gives_the_same_run(entry):
    compiled = run(zoo.objective("rosenbrock"), entry.solver(), max_work={"points": 40})
    called = run(python(zoo.rosenbrock), entry.solver(), max_work={"points": 40})
    np.testing.assert_allclose(called.x, compiled.x, rtol=1e-6)


@every
def test_a_run_continues_with_the_same_bits(entry, tmp_path):
    problem, path = python(zoo.rosenbrock), str(tmp_path / "run")
    whole = run(problem, entry.solver(), callback=stop_at(30))
    first = run(problem, entry.solver(), callback=stop_at(11), checkpoint=path)
    assert int(first.steps) == 11
    rest = run(problem, entry.solver(), callback=stop_at(30), checkpoint=path)
    np.testing.assert_array_equal(rest.x, whole.x)
    np.testing.assert_array_equal(rest.history.rows()["value"], whole.history.rows()["value"])
    assert int(rest.work.points) == int(whole.work.points)


@every
def test_jit_vmap_and_pytrees(entry):
    centre = {"a": jnp.array(1.0), "b": jnp.array([[0.5], [-1.0]])}

    def fun(x):
        return sum(jnp.sum((x[k] - centre[k]) ** 2) for k in centre)

    problem, solver = tolerax.Objective(fun), entry.solver()
    start = jax.tree.map(jnp.zeros_like, centre)
    one = lambda key: tolerax.solve(problem, solver, start, key=key, max_steps=400)  # noqa: E731
    keys = jax.random.split(jax.random.key(3), 2)
    batch = jax.jit(jax.vmap(one))(keys)
    for i in range(2):
        for leaf, truth in zip(*map(jax.tree.leaves, (batch.x, centre)), strict=True):
            np.testing.assert_allclose(leaf[i], truth, atol=10 * entry.close)


@every
def test_float32_stays_float32(entry):
    solution = run(
        tolerax.Objective(zoo.quadratic), entry.solver(tol=1e-3), START.astype(jnp.float32)
    )
    assert solution.x.dtype == solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=1e-2)


def test_exploring_stays_in_float32():
    """The constants of the distribution are numbers of NumPy's, which are double."""
    problem = tolerax.Objective(zoo.quadratic, bounds=(-5.0, 5.0))
    solver, start = tolerax.ModelTrustRegion(explore=True, tol=1e-3), START.astype(jnp.float32)
    solution = tolerax.solve(problem, solver, start, max_work={"points": 100})
    assert solution.x.dtype == solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=1e-2)


@every
def test_a_value_that_does_not_come_again_is_no_success(entry):
    seen = set()

    def again(x):
        known = x.tobytes() in seen
        seen.add(x.tobytes())
        return zoo.quadratic(x) + 1e-3 * known

    solution = run(python(again), entry.solver(tol=1e-2))
    assert not solution.success


@every
def test_minimize_knows_it(entry):
    result = tolerax.minimize(
        lambda x: float(zoo.quadratic(x)),
        zoo.START,
        method=entry.method,
        bounds=[(-5, 5), (-5, 5)],
        options={"max_steps": 600} | entry.fields,
    )
    np.testing.assert_allclose(result.x, zoo.CENTRE, atol=entry.close)
    assert result.nfev == int(result.solution.work.points)
