"""The smooth functions are what they claim to be, and the counter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.smooth import Counted, compare, effort, lbfgsb
from benchmarks.smooth_functions import TRIGONOMETRIC, Smooth, functions, newton_minimum, rosenbrock

FUNCTIONS = {problem.name: problem for problem in functions()}


def test_there_are_twenty_from_two_to_a_thousand_variables():
    sizes = [problem.n for problem in FUNCTIONS.values()]
    assert len(FUNCTIONS) == 20
    assert min(sizes) == 2
    assert max(sizes) == 1000


@pytest.mark.parametrize(
    ("name", "start", "minimizer"),
    [
        ("rosenbrock", 24.2, [1.0, 1.0]),
        ("beale", 14.203125, [3.0, 0.5]),
        ("brown_badly_scaled", 999998000003.0, [1e6, 2e-6]),
        ("himmelblau", 106.0, [3.0, 2.0]),
        ("helical_valley", 2500.0, [1.0, 0.0, 0.0]),
        ("wood", 19192.0, [1.0] * 4),
        ("variably_dimensioned", None, [1.0] * 30),
        ("powell_singular", 215.0 * 25, [0.0] * 100),
        ("rosenbrock_chain", None, [1.0] * 200),
    ],
)
def test_published_starts_and_minimizers(name, start, minimizer):
    """Values at the starts are those that the collection tables."""
    problem = FUNCTIONS[name]
    if start is not None:
        assert float(problem.fun(jnp.asarray(problem.x0))) == pytest.approx(start, rel=1e-5)
    x = jnp.asarray(minimizer)
    assert float(problem.fun(x)) <= 1e-12
    assert float(jnp.linalg.norm(jax.grad(problem.fun)(x))) <= 1e-5


def test_nesterov_minimum_is_at_its_closed_form():
    problem = FUNCTIONS["nesterov_worst"]
    x = jnp.asarray(1 - np.arange(1, problem.n + 1) / (problem.n + 1))
    assert float(problem.fun(x)) == pytest.approx(problem.minimum, rel=1e-12)
    assert float(jnp.linalg.norm(jax.grad(problem.fun)(x))) < 1e-12


@pytest.mark.parametrize("name", ["trigonometric", "penalty_one"])
def test_tabled_minima_are_local_minima(name):
    problem = FUNCTIONS[name]
    assert newton_minimum(problem.fun, problem.x0) == pytest.approx(problem.minimum, abs=1e-13)
    if name == "trigonometric":
        assert round(TRIGONOMETRIC, 10) == 2.79506e-5


@pytest.mark.parametrize("name", ["logistic_regression", "log_sum_exp"])
def test_newton_minima_are_below_what_the_peer_finds(name):
    problem = FUNCTIONS[name]
    x = lbfgsb(problem.fun, problem.x0, True)
    gap = float(problem.fun(jnp.asarray(x))) - problem.minimum
    assert -1e-12 <= gap <= 1e-6


def test_the_counter_sees_every_evaluation_and_nothing_else():
    counted = Counted(rosenbrock)
    x = jnp.array([-1.2, 1.0])
    jax.jit(jax.value_and_grad(counted))(x)
    counted(x)
    assert counted.count() == 2
    looped = Counted(rosenbrock)
    jax.lax.fori_loop(0, 5, lambda k, x: x - 1e-4 * jax.grad(looped)(x), x)
    assert looped.count() == 5
    assert looped.values[0] == pytest.approx(24.2)
    assert looped.until(24.2) == 1
    assert looped.until(0.0) is None


def test_peer_evaluations_are_those_that_scipy_reports():
    import scipy.optimize

    problem = FUNCTIONS["beale"]
    counted = Counted(problem.fun)
    lbfgsb(counted, problem.x0, False)
    result = scipy.optimize.minimize(
        lambda x: float(problem.fun(jnp.asarray(x))),
        problem.x0,
        jac=lambda x: np.asarray(jax.grad(problem.fun)(jnp.asarray(x))),
        method="L-BFGS-B",
    )
    assert counted.count() == result.nfev


def test_a_minimizer_that_never_arrives_costs_infinitely_much(monkeypatch):
    import benchmarks.smooth as smooth
    from benchmarks.frame import Settings

    quadratic = Smooth("q", lambda x: jnp.sum(x**2), np.ones(2))
    monkeypatch.setattr(smooth, "functions", lambda: [quadratic])
    settings = Settings(tell=lambda line: None)

    def lazy(fun, x0, tight):
        return np.asarray(jax.jit(lambda x: x + 0 * fun(x))(jnp.asarray(x0)))

    measured = compare(lazy, lbfgsb, settings)
    assert measured["smooth_unsolved"].figure == 1
    assert measured["smooth_vs_lbfgsb"].figure == float("inf")
    assert effort(lazy, quadratic).gap_at_stop == 1.0
