"""How runs of `minimize` end and what they report: limits, tolerances, statuses, callbacks."""

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import OptimizeResult

import tolerax
from tests.bowls import CENTRE, START, bowl, python_bowl, python_gradient
from tolerax._scipy import in_float64
from tolerax.contracts import Solver
from tolerax.errors import EvaluationError
from tolerax.minimize import CODES, METHODS, AtMost

rosen, rosen_der = scipy.optimize.rosen, scipy.optimize.rosen_der


@pytest.mark.parametrize("method", [*METHODS, "LINE-Search", "steepest_descent"])
def test_methods_by_name(method):
    result = tolerax.minimize(python_bowl, START, jac=python_gradient, method=method)
    assert result.success
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-5)


def test_maxiter_counts_iterations_and_maxfun_calls():
    options = {"maxiter": 5}
    result = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, options=options)
    assert (result.nit, result.status, result.success) == (5, 1, False)
    assert result.nfev > 5
    assert "maxiter" in result.message
    # The solution can be continued with the plain solver.
    more = tolerax.solve(
        tolerax.Objective(rosen, gradient=rosen_der, host=True),
        in_float64(tolerax.InexactLineSearch()),
        result.solution.state,
        max_steps=1000 - result.nfev,
    )
    np.testing.assert_allclose(more.x, 1.0, atol=1e-6)
    for name in ("maxfun", "maxfev"):
        result = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, options={name: 7})
        assert (result.nfev, result.status) == (7, 1)
    result = tolerax.minimize(rosen, [-1.2, 1.0], jac="2-point", options={"maxfun": 20})
    assert 20 <= result.nfev < 20 + 9  # one answer takes at most 1 + 2 + 1 + 4 + 1 calls
    options = {"maxfun": 20, "max_work": {"gradients": 3}}
    assert tolerax.minimize(rosen, [-1.2, 1.0], jac="2-point", options=options).njev == 3


def test_iteration_limit_passes_on_all_that_a_solver_may_say():
    # A method that is not overridden would answer for the wrapper, not for the solver.
    may_say = {name for name in vars(Solver) if not name.startswith("_")}
    assert may_say <= set(vars(AtMost))


def test_tol_means_the_gradient_and_explicit_options_win():
    scale = np.linalg.norm(rosen_der(np.array([-1.2, 1.0])))
    for tol in (1e-2, 1e-8):
        result = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, tol=tol)
        assert result.success
        assert np.linalg.norm(result.jac) <= 2 * tol
    loose = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, tol=1e-8, options={"atol": 1e-1})
    assert 1e-8 < np.linalg.norm(loose.jac) <= 2e-1
    loose = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, tol=1e-9, options={"rtol": 1e-3})
    assert 1e-8 < np.linalg.norm(loose.jac) <= 2e-3 * scale


def test_every_code_belongs_to_a_status():
    for name in CODES:
        assert hasattr(tolerax.Status, name)


# -- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fun", [bowl, python_bowl])
def test_callback_by_keyword_and_by_position(fun):
    seen, plain = [], []

    def callback(intermediate_result):
        seen.append(intermediate_result)

    jac = None if fun is bowl else python_gradient
    result = tolerax.minimize(fun, START, jac=jac, callback=callback)
    assert len(seen) == result.nit
    assert [step.nit for step in seen] == list(range(1, result.nit + 1))
    values = [step.fun for step in seen]
    assert values == sorted(values, reverse=True)
    assert isinstance(seen[0], OptimizeResult)
    assert values[-1] == pytest.approx(result.fun)

    def spoils(x):
        plain.append(x.copy())
        x[:] = 777.0

    again = tolerax.minimize(fun, START, jac=jac, callback=spoils)
    np.testing.assert_array_equal(again.x, result.x)
    np.testing.assert_array_equal(plain, [step.x for step in seen])
    # Returning something does not stop.
    assert tolerax.minimize(fun, START, jac=jac, callback=lambda x: True).success


def test_stop_iteration_stops_with_code_99():
    def callback(intermediate_result):
        if intermediate_result.nit == 3:
            raise StopIteration

    result = tolerax.minimize(rosen, [-1.2, 1.0], jac=rosen_der, callback=callback)
    assert (result.nit, result.status, result.success) == (3, 99, False)
    assert result.status_name == "stopped"
    assert result.fun < rosen(np.array([-1.2, 1.0]))


def test_an_exception_of_the_function_carries_the_best_point():
    def fun(x):
        if x[0] < 2:
            raise RuntimeError("the mesh tangled")
        return python_bowl(x)

    with pytest.raises(EvaluationError, match="the mesh tangled") as raised:
        tolerax.minimize(fun, START, jac=python_gradient)
    assert raised.value.solution.value <= 13.0
    options = {"on_error": "fail", "maxfun": 50}
    result = tolerax.minimize(fun, START, jac=python_gradient, options=options)
    assert not result.success
    assert result.x[0] >= 2
    assert "evaluations failed" in result.message
