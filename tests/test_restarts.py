"""Runs that begin again with more particles."""

import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tolerax import CBO, Objective, Status, solve_with_restarts


def rastrigin(x):
    return jnp.mean((x - 1) ** 2 - 10 * jnp.cos(2 * jnp.pi * (x - 1)) + 10)


PROBLEM, START, FEW = Objective(rastrigin), jnp.full(2, 3.0), CBO(particles=4, patience=5)


def test_the_best_of_all_runs_with_the_work_of_all():
    seen = zoo.Recorded(lambda x: float(rastrigin(x)))
    python = Objective(seen, host=True)
    solution = solve_with_restarts(python, FEW, START, restarts=2, max_steps=15)
    assert float(solution.value) == min(seen.values)
    # Runs of 4, 8 and 16 particles, of which each may end earlier.
    assert int(solution.work.points) == len(seen.points) <= 15 * (4 + 8 + 16)
    assert len(seen.points) > 15 * 16
    one = tolerax.solve(python, FEW, START, max_steps=15)
    again = solve_with_restarts(python, FEW, START, restarts=0, max_steps=15)
    assert (one.x == again.x).all()
    assert float(one.value) > float(solution.value)


def test_limits_hold_for_all_runs_together():
    seen = zoo.Recorded(lambda x: float(rastrigin(x)))
    python = Objective(seen, host=True)
    options = {"restarts": 5, "max_steps": 10}
    solution = solve_with_restarts(python, FEW, START, max_work={"points": 57}, **options)
    assert len(seen.points) == int(solution.work.points) == 57
    assert float(solution.value) == min(seen.values)
    solution = solve_with_restarts(python, FEW, START, max_seconds=1e-9, **options)
    assert solution.status == Status.time


def test_a_callback_that_stops_ends_the_series():
    def stop(step):
        raise StopIteration

    solution = solve_with_restarts(PROBLEM, FEW, START, callback=stop)
    assert solution.status == Status.stopped
    assert int(solution.work.points) == 4


def test_a_feasible_point_wins_over_a_lower_one():
    # The first key ends outside for want of steps: the value there is lower.
    problem = Objective(
        lambda x: jnp.sum(x), constraints=lambda x: x[0], constraint_bounds=(1.0, jnp.inf)
    )
    solver = CBO(particles=8, spread=0.1)
    solution = solve_with_restarts(problem, solver, jnp.zeros(2), restarts=1, max_steps=60)
    assert float(solution.violation) <= solver.feasibility


def test_a_run_cannot_be_the_start():
    state = tolerax.solve(PROBLEM, FEW, START, max_steps=1).state
    with pytest.raises(TypeError, match="x0 is the state of a run"):
        solve_with_restarts(PROBLEM, FEW, state)


def test_minimize_restarts():
    options = {
        "particles": 4,
        "patience": 5,
        "restarts": 2,
        "maxiter": 15,
    }
    result = tolerax.minimize(rastrigin, [3.0, 3.0], method="cbo", options=options)
    options.pop("restarts")
    once = tolerax.minimize(rastrigin, [3.0, 3.0], method="cbo", options=options)
    assert result.fun < once.fun
    assert result.nfev > once.nfev


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (FEW, {"restarts": -1}, "restarts is -1"),
        (FEW, {"growth": 0}, "growth is 0"),
        (FEW, {"checkpoint": "run.npz"}, "checkpoint holds one run"),
        (tolerax.InexactLineSearch(), {}, "InexactLineSearch has no population"),
        (CBO(particles=4, ensemble=jnp.zeros((4, 2))), {}, "ensemble is given, but growth is 2"),
    ],
)
def test_what_cannot_be_is_named(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solve_with_restarts(PROBLEM, solver, START, **options)


def test_minimize_names_the_method_that_has_no_population():
    options = {"restarts": 2, "maxiter": 5}
    with pytest.raises(ValueError, match="restarts is 2, but InexactNewton has no population"):
        tolerax.minimize(lambda x: x @ x, np.ones(2), method="newton", options=options)
