"""What solvers whose answer is an ensemble must do as optimizers: the questions of
`test_populations`, put in Python code, to which all of them share one compilation a solver."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.test_runs import stop_at
from tolerax import LeastSquares, Objective, Status, Workers
from tolerax.solvers import ConsensusSampling, EnsembleKalmanInversion

FREE = (jnp.full(2, -jnp.inf), jnp.full(2, jnp.inf))
START = jnp.asarray(zoo.START)


def kalman(residuals, bounds=FREE, **options):
    return LeastSquares(residuals, size=2, bounds=bounds, host=True, **options)


def sampling(residuals, bounds=FREE, **options):
    fun = lambda x: 0.5 * float(np.sum(np.square(residuals(x))))  # noqa: E731
    return Objective(fun, bounds=bounds, host=True, **options)


# The solver, and the problem that it takes, made of residuals.
ENSEMBLES = {
    "kalman": (EnsembleKalmanInversion(particles=30, spread=2.0), kalman),
    "sampling": (ConsensusSampling(particles=60, mode="optimize", share=0.7, spread=2.0), sampling),
}
every = pytest.mark.parametrize("name", ENSEMBLES)


def run(name, residuals, start=START, max_steps=300, **options):
    solver, problem = ENSEMBLES[name]
    made = {key: options.pop(key) for key in ("bounds", "on_error") if key in options}
    return tolerax.solve(problem(residuals, **made), solver, start, max_steps=max_steps, **options)


def bowl(x):
    return x - zoo.CENTRE


@every
def test_reaches_a_known_minimum_within_the_bounds(name):
    for known in (zoo.PROBLEMS["quadratic"], zoo.PROBLEMS["bounded"]):
        seen = zoo.Recorded(bowl)
        bounds = (jnp.asarray(known.lower), jnp.asarray(known.upper))
        solution = run(name, seen, jnp.asarray(known.start), bounds=bounds)
        assert solution.status == Status.consensus, solution.message
        np.testing.assert_allclose(solution.x, known.minimum, atol=2e-2)
        points = np.array(seen.points)
        assert len(points) == int(solution.work.points)
        assert np.all((points >= known.lower) & (points <= known.upper))


@every
def test_a_budget_of_points_is_kept_to_the_point(name):
    seen = zoo.Recorded(bowl)
    solution = run(name, seen, max_work={"points": 137})
    assert solution.status == Status.budget
    assert len(seen.points) == int(solution.work.points) == 137
    values = [0.5 * np.sum(np.square(bowl(x))) for x in seen.points]
    assert float(solution.value) == pytest.approx(min(values), rel=1e-15)


@every
def test_a_callback_stops_the_run_and_it_goes_on_to_the_same_bits(name, tmp_path):
    whole = run(name, bowl, max_steps=12)
    path = str(tmp_path / "run")
    stopped = run(name, bowl, max_steps=12, callback=stop_at(5), checkpoint=path)
    assert stopped.status == Status.stopped
    rest = run(name, bowl, max_steps=12, checkpoint=path)
    assert int(rest.steps) == int(whole.steps) == 12
    np.testing.assert_array_equal(rest.x, whole.x)
    np.testing.assert_array_equal(rest.history.rows()["value"], whole.history.rows()["value"])


@every
def test_points_that_fail_are_counted_and_cost_nothing_else(name):
    failed = []

    def fails(x):
        if x[0] + x[1] > 4:  # half of the start; at the minimum it is -1
            failed.append(x)
            if len(failed) % 2:
                raise RuntimeError("no convergence")
            return np.full(2, np.nan)
        return bowl(x)

    solution = run(name, fails, on_error="fail")
    assert solution.status == Status.consensus
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=2e-2)
    assert int(solution.state.failures) == len(failed) > 10


@every
def test_all_failing_is_a_status_and_an_exception_carries_the_best_point(name):
    nothing = run(name, lambda x: x * np.nan)
    assert nothing.status == Status.all_failed
    assert int(nothing.steps) == 1
    calls = []

    def raises(x):
        calls.append(0.5 * float(np.sum(np.square(bowl(x)))))
        if len(calls) > 150:
            raise ZeroDivisionError("no")
        return bowl(x)

    with pytest.raises(tolerax.errors.EvaluationError) as caught:
        run(name, raises)
    assert any(np.isclose(float(caught.value.solution.value), calls, rtol=1e-15))


@every
def test_the_key_decides_and_no_worker_does(name, tmp_path):
    one, third = (run(name, bowl, max_steps=5, key=jax.random.key(k)) for k in (0, 2))
    assert float(one.value) != float(third.value)
    particles = ENSEMBLES[name][0].particles
    with ThreadPoolExecutor(2) as pool:
        workers = Workers(pool, journal=tmp_path / "journal", deadline=20.0)
        run(name, bowl, max_steps=3, executor=workers)
        again = Workers(pool, journal=tmp_path / "journal", deadline=20.0)
        other = run(name, bowl, max_steps=5, executor=again)
    np.testing.assert_array_equal(other.x, one.x)
    assert again.counts == {"replayed": 3 * particles, "evaluated": 2 * particles}


@every
def test_float32_stays_float32(name):
    solution = run(name, bowl, START.astype(jnp.float32), bounds=(-9.0, 9.0))
    assert solution.x.dtype == solution.value.dtype == jnp.float32
    assert solution.success
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=2e-2)
