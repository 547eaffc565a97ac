"""Declared constraints: their values, derivatives and violation, and who refuses them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import LinearConstraint, NonlinearConstraint

import tolerax
from tolerax import Accuracy, Objective, PointStatus, Query, Workers
from tolerax._scipy_constraints import joined
from tolerax.solvers import ConsensusFreezing

ASK = Accuracy(0.1, 0.1)
X = jnp.array([1.0, 2.0])
LIMITS = ({"disc": -np.inf, "line": 1.0}, {"disc": 2.0, "line": 1.0})


lower: Any = [2.0, -np.inf]
SECOND = LinearConstraint([[1.0, 1.0], [0.0, 1.0]], lower)


def fun(x):
    return x[0] ** 2 * x[1]


def evaluate(problem, *args, **options) -> Any:
    return problem.evaluate(Query(*args, **options))


def both(x):
    return {"disc": x[0] ** 2 + x[1] ** 2, "line": x[0] + x[1]}


COMPILED = Objective(fun, constraints=both, constraint_bounds=LIMITS)
PYTHON = Objective(lambda x: float(fun(x)), constraints=both, constraint_bounds=LIMITS, host=True)


@pytest.mark.parametrize("problem", [COMPILED, PYTHON], ids=["compiled", "python"])
def test_values_and_violation_of_points_and_batches(problem):
    points = jnp.array([[1.0, 2.0], [0.5, 0.5], [np.nan, 1.0]])
    mask = jnp.array([True, True, True])
    answer = evaluate(problem, points, ASK, mask=mask, derivatives=0)
    np.testing.assert_allclose(answer.constraints["disc"][:2], [5.0, 0.5])
    # At (1, 2) the disc is left by 3 and the line by 2; (1/2, 1/2) is feasible.
    np.testing.assert_allclose(answer.violation, [3.0, 0.0, np.inf])
    assert list(np.asarray(answer.status == PointStatus.failed)) == [False, False, True]
    one = evaluate(problem, points[0], ASK, derivatives=0)
    assert float(one.violation) == 3.0
    assert float(one.value) == 2.0


def test_derivatives_are_those_of_the_constraints():
    answer = evaluate(COMPILED, X, ASK, derivatives=2)
    v, w = jnp.array([0.3, -0.7]), {"disc": 2.0, "line": -1.0}
    image = answer.jacobian.mv(v)
    np.testing.assert_allclose([image["disc"], image["line"]], [2 * (X @ v), v.sum()])
    np.testing.assert_allclose(answer.jacobian.rmv(jax.tree.map(jnp.asarray, w)), 4 * X - 1)
    # D^2 fun = [[2 y, 2 x], [2 x, 0]], and the disc adds 2 times its multiplier.
    expected = jnp.array([[4.0, 2.0], [2.0, 0.0]]) @ v
    np.testing.assert_allclose(answer.hessian.mv(v), expected)
    np.testing.assert_allclose(answer.hessian.mv(v, w), expected + 4 * v)


def test_a_constraint_that_is_no_number_fails_the_point():
    problem = Objective(lambda x: x[0], constraints=lambda x: jnp.log(x))
    answer = evaluate(problem, jnp.array([-1.0, 1.0]), ASK, derivatives=0)
    assert bool(answer.status == PointStatus.failed)
    assert float(answer.violation) == np.inf


@pytest.mark.parametrize("solver", [tolerax.CBO(particles=60), ConsensusFreezing(particles=60)])
def test_a_solver_that_looks_at_them_meets_them(solver):
    # The nearest point of the line x + y = 2 to the origin, kept from it by nothing else.
    problem = Objective(
        lambda x: jnp.sum(x**2), constraints=lambda x: x[0] + x[1], constraint_bounds=(2.0, np.inf)
    )
    solution = tolerax.solve(problem, solver, jnp.zeros(2), max_steps=400)
    assert float(solution.violation) <= 1e-3
    np.testing.assert_allclose(solution.x, [1.0, 1.0], atol=0.05)


def test_a_solver_that_does_not_look_at_them_refuses():
    with pytest.raises(ValueError, match="InexactLineSearch does not look at constraints"):
        tolerax.solve(COMPILED, tolerax.InexactLineSearch(), X)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"constraint_bounds": (0, 1)}, ValueError, "without constraints"),
        ({"constraints": both, "constraint_bounds": (1.0, 0.0)}, ValueError, "swap or widen"),
        ({"constraints": both, "constraint_bounds": (np.nan, 0.0)}, ValueError, "holds NaN"),
        ({"constraints": both, "host": True}, TypeError, "constraint_bounds is None"),
        ({"constraint_jacobian": "2-point"}, ValueError, "given without constraints"),
        ({"constraints": both, "constraint_jacobian": "2-point"}, ValueError, "JAX differentiates"),
    ],
)
def test_bad_constraints_are_named(options, error, match):
    with pytest.raises(error, match=match):
        Objective(fun, **options)


def test_bounds_that_do_not_fit_the_constraints_are_named():
    problem = Objective(fun, constraints=both, constraint_bounds=(np.zeros(3), np.ones(3)))
    with pytest.raises(ValueError, match="constraint_bounds: the lower bound has structure"):
        tolerax.solve(problem, tolerax.CBO(particles=4), X)
    problem = Objective(
        fun, constraints=lambda x: 0.0, constraint_bounds=(np.zeros(2), np.ones(2)), host=True
    )
    with pytest.raises(TypeError, match=r"1 constraints .* constraint_bounds has 2"):
        evaluate(problem, X, ASK, derivatives=0)


def python_problem(jacobian: Any, bounds: Any = None) -> Objective:
    return Objective(
        lambda x: float(fun(x)),
        gradient="3-point",
        bounds=bounds,
        constraints=both,
        constraint_bounds=LIMITS,
        constraint_jacobian=jacobian,
        host=True,
    )


# Rounding over the step: 2e-16 * 5 / 1e-8 forward, / 6e-6 central; curvature 2 times 1e-8 forward.
@pytest.mark.parametrize(
    ("jacobian", "error"),
    [("2-point", 2e-7), ("3-point", 1e-9), (lambda x: np.array([2 * x, np.ones(2)]), 1e-15)],
)
def test_python_constraints_are_differentiated_as_asked(jacobian, error):
    answer = evaluate(python_problem(jacobian), X, ASK, derivatives=1)
    exact = evaluate(COMPILED, X, ASK, derivatives=1)
    v, w = jnp.array([0.3, -0.7]), {"disc": jnp.array(2.0), "line": jnp.array(-1.0)}
    for name in LIMITS[0]:
        assert abs(answer.jacobian.mv(v)[name] - exact.jacobian.mv(v)[name]) <= error
    np.testing.assert_allclose(answer.jacobian.rmv(w), exact.jacobian.rmv(w), atol=4 * error)
    assert not answer.provenance.certified  # The gradient is by differences.
    # Without derivatives nothing is differentiated.
    assert evaluate(python_problem(jacobian), X, ASK, derivatives=0).jacobian is None


@pytest.mark.parametrize("jacobian", ["2-point", "3-point"])
def test_differences_of_constraints_stay_within_bounds(jacobian):
    seen = []

    def watched(x):
        seen.append(np.array(x))
        return {"disc": np.log(x[0]), "line": x[1]}

    problem = eqx.tree_at(
        lambda p: p.constraints, python_problem(jacobian, (np.array([1.0, 2.0]), 2.0)), watched
    )
    answer = evaluate(problem, X, ASK, derivatives=1)
    # x[0] moves up only, x[1] not at all.
    assert min(x[0] for x in seen) >= 1.0
    assert {float(x[1]) for x in seen} == {2.0}
    columns = [answer.jacobian.mv(e) for e in jnp.eye(2)]
    np.testing.assert_allclose(columns[0]["disc"], 1.0, atol=1e-7)
    assert float(columns[1]["line"]) == 0.0


def test_python_constraints_without_derivatives_say_so():
    with pytest.raises(TypeError, match="give `constraint_jacobian`: a callable"):
        evaluate(python_problem(None), X, ASK, derivatives=1)
    with pytest.raises(TypeError, match=r"shape \(2,\) .* return a real matrix of shape \(2, 2\)"):
        evaluate(python_problem(lambda x: np.ones(2)), X, ASK, derivatives=1)
    nowhere = python_problem(lambda x: np.full((2, 2), np.nan))
    assert bool(evaluate(nowhere, X, ASK, derivatives=1).status == PointStatus.failed)


def test_a_journal_keeps_constraints(tmp_path):
    def values():
        workers = Workers(journal=tmp_path / "journal")
        problem = PYTHON.on(workers)
        answer = evaluate(problem, X, ASK, derivatives=0)
        problem.close()
        return answer, workers.counts

    first, _ = values()
    again, counts = values()
    assert counts == {"replayed": 1}
    assert float(again.constraints["disc"]) == float(first.constraints["disc"]) == 5.0


@pytest.mark.parametrize(
    ("constraints", "values", "lower", "upper"),
    [
        ({"type": "ineq", "fun": lambda x: x[0] - 1.0}, [0.0], [0.0], [np.inf]),
        ({"type": "eq", "fun": lambda x, a: x - a, "args": 3.0}, [-2.0, -1.0], [0, 0], [0, 0]),
        (NonlinearConstraint(lambda x: x[0] * x[1], 1.0, 4.0), [2.0], [1.0], [4.0]),
        (
            SECOND,
            [3, 2],
            [2, -np.inf],
            [np.inf] * 2,
        ),
        (
            [LinearConstraint([1.0, 2.0], ub=7.0), {"type": "ineq", "fun": lambda x: float(x[1])}],
            [5.0, 2.0],
            [-np.inf, 0.0],
            [7.0, np.inf],
        ),
    ],
)
def test_the_constraints_of_scipy_become_one_function_and_its_bounds(
    constraints, values, lower, upper
):
    x = np.array([1.0, 2.0])
    together, (low, high) = joined(constraints, x)
    for found, expected in ((together(x), values), (low, lower), (high, upper)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number", [jnp.asarray, float], ids=["compiled", "python"])
def test_minimize_meets_constraints(number):
    result = tolerax.minimize(
        lambda x: x[0] ** 2 + x[1] ** 2,
        [0.0, 0.0],
        method="cbo",
        constraints={"type": "ineq", "fun": lambda x: number(x[0]) - 1.0},
        options={"particles": 60, "maxiter": 300},
    )
    np.testing.assert_allclose(result.x, [1.0, 0.0], atol=0.05)
    assert float(result.solution.violation) <= 1e-6


@pytest.mark.parametrize(
    ("constraint", "error", "match"),
    [
        ({"type": "le", "fun": fun}, ValueError, r'constraints\[0\] has type .le.: use "eq"'),
        ({"type": "eq", "fun": 1}, TypeError, r"constraints\[0\]: fun is 1"),
        ({"type": "eq", "fun": fun, "bounds": 1}, ValueError, "the key 'bounds'"),
        (3.0, TypeError, "give a dict"),
        (LinearConstraint(np.eye(3)), ValueError, r"A has shape \(3, 3\), x0 has 2"),
        (NonlinearConstraint(lambda x: x, np.zeros(3), 1.0), ValueError, "has 2 values at x0"),
        (NonlinearConstraint(fun, 0, 1, keep_feasible=True), ValueError, "keep_feasible"),
    ],
)
def test_bad_scipy_constraints_are_named(constraint, error, match):
    with pytest.raises(error, match=match):
        tolerax.minimize(fun, [1.0, 1.0], method="cbo", constraints=[constraint])
