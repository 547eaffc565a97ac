"""`minimize` and `scipy_method`: what hands trained on SciPy expect, and nothing ignored."""

import functools
import inspect
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from scipy.optimize import LinearConstraint, OptimizeResult, OptimizeWarning

import tolerax
from tests.bowls import CENTRE, START, bowl, python_bowl, python_gradient
from tolerax.contracts import Solver

Bounds: Any = scipy.optimize.Bounds  # its stubs admit scalars only


rosen, rosen_der = scipy.optimize.rosen, scipy.optimize.rosen_der


def test_arguments_are_those_of_scipy():
    ours = inspect.signature(tolerax.minimize).parameters
    theirs = inspect.signature(scipy.optimize.minimize).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        if name not in ("x0", "fun"):
            assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("fun", [bowl, python_bowl])
def test_result_is_scipys_with_numpy_inside(fun):
    result = tolerax.minimize(fun, START, jac=None if fun is bowl else python_gradient)
    assert isinstance(result, OptimizeResult)
    assert type(result.x) is np.ndarray
    assert result.x.dtype == np.float64
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-6)
    assert type(result.jac) is np.ndarray
    np.testing.assert_allclose(result.jac, 0, atol=1e-6)
    for name in ("fun", "value_error", "gradient_error"):
        assert type(result[name]) is float
    for name in ("status", "nfev", "njev", "nhev", "nit"):
        assert type(result[name]) is int
    assert result.success is True
    assert result.status == 0
    assert result.status_name == "converged"
    assert result.message == tolerax.Status[tolerax.Status.converged]
    assert result.nfev == result.njev == result.work["values"]
    assert result.nhev == 0
    assert 0 < result.nit < result.nfev
    assert float(result.solution.value) == result.fun
    result.x[0] = 7.0  # a copy that its owner may write to


def test_agrees_with_scipy_on_ten_variables_with_bounds():
    start = np.linspace(-0.9, 0.7, 10)
    bounds = Bounds(-1.0, np.where(np.arange(10) == 4, 0.3, 0.9))
    theirs = scipy.optimize.minimize(
        rosen, start, jac=rosen_der, method="L-BFGS-B", bounds=bounds, tol=1e-14
    )
    ours = tolerax.minimize(rosen, start, jac=rosen_der, bounds=bounds)
    assert ours.success
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-5)
    np.testing.assert_allclose(ours.fun, theirs.fun, rtol=1e-9)


# -- the start ------------------------------------------------------------------------------------


def parabola(x):
    """Of shape (1,), as SciPy accepts it."""
    return (x - 1) ** 2


@pytest.mark.parametrize("start", [4, 4.0, [4], np.array(4), np.float32(4)])
def test_a_scalar_start_is_a_vector_of_one(start):
    result = tolerax.minimize(parabola, start)
    assert result.x.shape == (1,)
    assert isinstance(result.fun, float)
    np.testing.assert_allclose(result.x, 1.0, atol=1e-6)


@pytest.mark.parametrize("start", [(4, 0), [True, False], np.array([4, 0], np.int8)])
def test_integers_are_cast(start):
    result = tolerax.minimize(python_bowl, start, jac=python_gradient)
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ([[1.0, 2.0]], ValueError, r"x0 has shape \(1, 2\).*ravel"),
        ([], ValueError, "x0 is empty"),
        ([1j, 0], TypeError, "x0 is complex"),
        (None, TypeError, "x0 is of type object"),
        (["a", "b"], TypeError, "x0 is of type"),
    ],
)
def test_a_start_that_cannot_be_used_is_named(start, error, message):
    with pytest.raises(error, match=message):
        tolerax.minimize(bowl, start)


def test_a_start_outside_the_bounds_is_moved_with_a_warning():
    bounds = [(0, 2), (None, None)]
    with pytest.warns(OptimizeWarning, match=r"x0 lies outside .* 1 of 2 entries \(entry 0 is 4"):
        result = tolerax.minimize(python_bowl, START, jac=python_gradient, bounds=bounds)
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-6)


def test_a_start_that_is_not_finite_is_reported():
    for bounds in (None, [(0, 5), (-3, 5)]):
        result = tolerax.minimize(python_bowl, [np.nan, 0], jac=python_gradient, bounds=bounds)
        assert (result.success, result.status_name) == (False, "non_finite_start")


# -- the function ---------------------------------------------------------------------------------


def weighted(x, weights, power=2, kind="plain"):
    assert kind == "plain"
    return jnp.sum(weights * x**power)


def test_args_reach_function_and_jac():
    weights = np.array([1.0, 3.0])

    def python(x, weights, power, kind):
        return float(np.sum(np.asarray(weights) * np.asarray(x) ** power))

    def slope(x, weights, power, kind):
        return power * weights * np.asarray(x) ** (power - 1)

    assert tolerax.minimize(weighted, [1.0, 1.0], args=(weights, 2, "plain")).success
    result = tolerax.minimize(python, [1.0, 1.0], args=(weights, 2, "plain"), jac=slope)
    assert result.success
    # A single argument may stand without its tuple, also what cannot be hashed.
    held = {"weights": {1.0, 3.0}}
    result = tolerax.minimize(lambda x, h: jnp.sum(x**2) * len(h["weights"]), [1.0], args=held)
    assert result.success


def test_other_arguments_and_tolerances_do_not_compile_again():
    traced = []

    def fun(x, weights):
        traced.append(1)
        return jnp.sum(weights * x**2)

    tolerax.minimize(fun, [1.0, 1.0], args=(np.ones(2),))
    first = len(traced)
    for tol in (1e-4, 1e-5):
        tolerax.minimize(fun, [2.0, 1.0], args=(np.full(2, tol),), tol=tol)
    # Two calls each to see whether it can be traced; nothing more.
    assert len(traced) == first + 4


@pytest.mark.parametrize(
    ("jac", "traceable"),
    [
        (True, True),
        ("list", True),
        (True, False),
        ("callable", False),
        ("list", False),
        ("row", False),
    ],
)
def test_forms_of_the_gradient(jac, traceable):
    wrap = (lambda x: x) if traceable else np.asarray
    value = bowl if traceable else python_bowl
    forms = {
        "callable": lambda x: 2 * (wrap(x) - CENTRE),
        "list": lambda x: [2 * (x[0] - 1), 2 * (x[1] + 2)],
        "row": lambda x: (2 * (wrap(x) - CENTRE)).reshape(1, 2),
    }
    if jac is True:
        result = tolerax.minimize(lambda x: (value(x), 2 * (wrap(x) - CENTRE)), START, jac=True)
    else:
        result = tolerax.minimize(value, START, jac=forms[jac])
    assert result.success
    assert result.status_name == "converged"
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-6)


@pytest.mark.parametrize("jac", ["2-point", "3-point"])
def test_finite_differences_count_every_call_and_say_that_they_estimate(jac):
    calls = []

    def fun(x):
        calls.append(np.array(x))
        return python_bowl(x)

    bounds = [(1.5, 6.0), (-1.0, 0.5)]
    result = tolerax.minimize(fun, START, jac=jac, bounds=bounds)
    assert result.success
    assert result.status_name == "converged_estimated"
    assert result.nfev == len(calls)
    assert 0 < result.gradient_error < 1e-6
    np.testing.assert_allclose(result.x, [1.5, -1.0])
    np.testing.assert_allclose(result.jac, python_gradient(result.x), atol=result.gradient_error)
    for x in calls:
        assert np.all((x >= [1.5, -1.0]) & (x <= [6.0, 0.5]))


def test_python_code_without_a_gradient_is_told_what_to_give():
    calls = []

    def fun(x):
        calls.append(1)
        return float(x[0])

    with pytest.raises(TypeError, match=r'`jac` of `minimize`.*"2-point"') as raised:
        tolerax.minimize(fun, START)
    assert any("JAX could not trace fun" in note for note in raised.value.__notes__)
    assert len(calls) == 1  # the attempt to trace it


def test_functions_of_more_than_x_are_not_frozen():
    rng = np.random.default_rng(0)

    def noisy(x):
        return jnp.sum(x**2) + 1e-12 * rng.normal()

    with pytest.raises(TypeError, match="jac") as raised:
        tolerax.minimize(noisy, START)
    assert any("not a pure function" in note for note in raised.value.__notes__)
    with pytest.raises(TypeError, match="jac") as raised:
        tolerax.minimize(lambda x: 3.0, START)
    assert any("does not depend on x" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fun": 3.0}, TypeError, "fun"),
        ({"jac": "cs"}, ValueError, "jac is 'cs'.*'2-point', '3-point'"),
        ({"jac": 3}, ValueError, "jac is 3"),
        ({"jac": True}, TypeError, r"fun must return \(value, gradient\)"),
        ({"method": "BFGS"}, ValueError, "unknown method 'BFGS'.*line-search"),
        ({"method": 3}, TypeError, "method"),
        ({"options": {"gtol": 1}}, ValueError, "unknown option 'gtol'.*atol"),
        ({"options": [("atol", 1)]}, TypeError, "options"),
        ({"options": {"maxiter": 0}}, ValueError, "maxiter is 0"),
        ({"options": {"maxfun": 2.5}}, ValueError, "maxfun is 2.5"),
        ({"options": {"atol": -1.0}}, ValueError, "atol is -1.0"),
        ({"options": {"on_error": "fail"}}, ValueError, "on_error is given"),
        ({"options": {"max_steps": 0}}, ValueError, "max_steps is 0"),
        ({"callback": 3}, TypeError, "callback"),
        ({"hess": lambda x: np.eye(2)}, ValueError, "hess is given"),
        ({"hessp": lambda x, p: p}, ValueError, "hessp is given"),
        (
            {"constraints": LinearConstraint(np.eye(2)), "method": "newton"},
            ValueError,
            "constraints is given",
        ),
        ({"bounds": [(0, 1)]}, ValueError, "bounds has 1 entries, x0 has 2"),
        ({"bounds": [(0, 1, 2), (0, 1)]}, ValueError, r"bounds\[0\]"),
        ({"bounds": 3}, TypeError, "bounds is 3"),
        ({"bounds": [(1, 0), (0, 1)]}, ValueError, "lower bound 1.0 .* above the upper bound 0.0"),
        ({"bounds": Bounds([0, np.nan], 1)}, ValueError, "NaN"),
        ({"bounds": Bounds([0, 0, 0], 1)}, ValueError, r"shape \(3,\)"),
        ({"bounds": [("a", 1), (0, 1)]}, TypeError, "bounds is of type"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_what_cannot_be_honoured_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tolerax.minimize(**({"fun": bowl, "x0": START} | arguments))


@pytest.mark.parametrize("constraints", [(), [], None, {}])
def test_no_constraints_are_no_constraints(constraints):
    assert tolerax.minimize(bowl, START, constraints=constraints).success


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [
        [(2, 6), (-1, None)],
        ((2.0, 6), (-1, np.inf)),
        np.array([[2, 6], [-1, np.inf]]),
        Bounds([2, -1], [6, np.inf]),
        zip([2, -1], [6, None], strict=True),
    ],
    ids=["pairs", "tuples", "array", "Bounds", "iterator"],
)
def test_forms_of_bounds(bounds):
    result = tolerax.minimize(python_bowl, START, jac=python_gradient, bounds=bounds)
    assert result.success
    np.testing.assert_array_equal(result.x, [2.0, -1.0])


def test_fixed_variables():
    result = tolerax.minimize(python_bowl, START, jac="2-point", bounds=[(4, 4), (None, None)])
    assert result.success
    np.testing.assert_allclose(result.x, [4.0, -2.0], atol=1e-6)
    calls = []

    def fun(x):
        calls.append(1)
        return python_bowl(x)

    result = tolerax.minimize(fun, START, jac="2-point", bounds=[(4, 4), (0, 0)])
    assert (result.success, result.status, result.fun, result.nfev) == (True, 0, 13.0, 1)
    assert calls == [1]
    assert "fixed" in result.message
    result = tolerax.minimize(lambda x: np.nan, START, jac="2-point", bounds=[(4, 4), (0, 0)])
    assert (result.success, result.status_name) == (False, "non_finite_start")


@pytest.mark.parametrize("method", ["cdsm", "sqp"])
def test_fixed_variables_do_not_hide_a_constraint(method):
    limits = {"bounds": [(1, 1), (1, 1)], "method": method}
    known = lambda low: {"type": "ineq", "fun": lambda x: x[0] - low}  # noqa: E731
    result = tolerax.minimize(lambda x: x[0] + x[1], [1.0, 1.0], constraints=known(5), **limits)
    assert (result.success, result.status_name) == (False, "infeasible")
    assert "violated by 4.0" in result.message
    assert tolerax.minimize(
        lambda x: x[0] + x[1], [1.0, 1.0], constraints=known(1), **limits
    ).success


class Ignores(Solver):
    """Asks for the start again and again."""

    def init(self, start):
        return start.x

    def ask(self, state):
        return tolerax.Query(state, tolerax.Accuracy(1.0, 1.0), derivatives=0)

    def tell(self, state, query, evaluation):
        return state

    def terminate(self, state):
        return jnp.array(False), tolerax.Status.running


def test_a_solver_that_ignores_bounds_or_tolerances_is_refused():
    with pytest.raises(ValueError, match="Ignores does not honour bounds"):
        tolerax.minimize(bowl, START, method=Ignores(), bounds=[(0, 5), (0, 5)])
    # Bounds that bound nothing are none.
    result = tolerax.minimize(
        python_bowl,
        START,
        method=Ignores(),
        bounds=Bounds(-np.inf, np.inf),
        options={"max_steps": 3},
    )
    assert (result.nit, result.nfev, result.njev, result.status) == (3, 3, 0, 1)
    assert "jac" not in result
    with pytest.raises(ValueError, match="Ignores has no tolerance"):
        tolerax.minimize(bowl, START, method=Ignores(), tol=1e-3)
    # Without iterations of its own, answers are iterations.
    options = {"maxiter": 4}
    result = tolerax.minimize(python_bowl, START, method=Ignores(), options=options)
    assert (result.nit, result.nfev, result.status_name) == (4, 4, "budget")


# -- precision, problems, company -----------------------------------------------------------------


@pytest.mark.parametrize("fun", [bowl, python_bowl])
def test_float64_whatever_the_flag(fun):
    jac = None if fun is bowl else "2-point"
    types = []
    with jax.enable_x64(False):
        result = tolerax.minimize(
            fun, START, jac=jac, callback=lambda x: types.append(x.dtype), tol=1e-7
        )
        assert jnp.ones(2).dtype == jnp.float32  # the flag is as it was
    assert result.x.dtype == np.float64
    assert set(types) == {np.dtype(np.float64)}
    assert result.success
    np.testing.assert_allclose(result.x, CENTRE, atol=1e-7)  # not within reach of float32


class Shifted(tolerax.Problem):
    """A problem with an array of its own, on a tree."""

    shift: jax.Array
    bounds: Any

    def __init__(self, shift, bounds=None):
        self.shift = shift
        self.bounds = bounds

    def evaluate(self, query):
        fun = lambda x: jnp.sum((ravel_pytree(x)[0] - self.shift) ** 2)  # noqa: E731
        return tolerax.Objective(fun).evaluate(query)


def test_problems_of_the_library_are_minimized_on_their_trees():
    with jax.enable_x64(False):
        problem = Shifted(jnp.array([1.0, 2.0, 1 / 3]))
    start = {"a": 0, "b": np.zeros(2, np.float32)}
    result = tolerax.minimize(problem, start, method="hoag")
    assert result.success
    assert result.x["a"].shape == ()
    assert result.x["b"].dtype == np.float64
    # A third as float32 knows it, but found in float64.
    np.testing.assert_allclose(result.x["b"], [2.0, float(np.float32(1 / 3))], atol=1e-6)
    bounded = tolerax.minimize(problem, [0, 0, 0.0], method="hoag", bounds=[(None, 0.5)] * 3)
    np.testing.assert_allclose(bounded.x, [0.5, 0.5, 1 / 3], atol=1e-6)
    own = Shifted(jnp.array([1.0, 2.0, 3.0]), bounds=(0.0, 1.5))
    with pytest.warns(OptimizeWarning, match="outside"):
        result = tolerax.minimize(own, [-1.0, 0.5, 0.5], method="hoag")
    np.testing.assert_allclose(result.x, [1.0, 1.5, 1.5], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": (1,)}, "args is given"),
        ({"jac": True}, "jac is given"),
        ({"options": {"on_error": "fail"}}, "on_error is given"),
        ({"bounds": [(0, 1)] * 3}, "the problem has bounds"),
    ],
)
def test_problems_bring_what_belongs_to_them(arguments, message):
    problem = Shifted(jnp.zeros(3), bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match=message):
        tolerax.minimize(problem, np.zeros(3), **arguments)
    with pytest.raises(ValueError, match="x0 is not a vector"):
        tolerax.minimize(Shifted(jnp.zeros(3)), {"a": np.zeros(3)}, bounds=[(0, 1)] * 3)


def apart(y, a):
    return (y[0] - a) ** 2


def test_runs_within_runs():
    def outer(x):
        inner = tolerax.minimize(apart, [0.0], args=(x[0],))
        return float(inner.x[0] ** 2 + (x[0] - 2) ** 2)

    result = tolerax.minimize(outer, [0.5], jac="3-point", options={"atol": 1e-4})
    np.testing.assert_allclose(result.x, 1.0, atol=1e-3)


def test_nothing_is_printed_unless_asked(capfd):
    tolerax.minimize(python_bowl, START, jac=python_gradient)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    result = tolerax.minimize(python_bowl, START, jac=python_gradient, options={"disp": True})
    assert result.success
    captured = capfd.readouterr()
    assert captured.out + captured.err


# -- as a method of SciPy -------------------------------------------------------------------------

method = tolerax.scipy_method(tolerax.InexactLineSearch())
through_scipy = functools.partial(scipy.optimize.minimize, method=method)


@pytest.mark.parametrize("jac", [None, "2-point", "3-point", rosen_der, True])
def test_method_of_scipy_with_every_kind_of_jac(jac):
    fun = (lambda x: (rosen(x), rosen_der(x))) if jac is True else rosen
    result = through_scipy(fun, [-1.2, 1.0], jac=jac)
    assert result.success, result.message
    np.testing.assert_allclose(result.x, 1.0, atol=1e-5)
    exact = callable(jac) or jac is True
    assert result.status_name == ("converged" if exact else "converged_estimated")


def test_method_of_scipy_takes_the_rest_too():
    seen = []
    result = through_scipy(
        lambda x, a: a * python_bowl(x),
        START,
        args=(2.0,),
        bounds=Bounds([2, -3], [6, 5]),
        tol=1e-4,
        callback=lambda intermediate_result: seen.append(intermediate_result.fun),
        options={"maxiter": 50},
    )
    assert result.success
    np.testing.assert_allclose(result.x, [2.0, -2.0], atol=1e-4)
    assert len(seen) == result.nit
    with pytest.raises(ValueError, match="unknown option 'ftol'"):
        through_scipy(bowl, START, options={"ftol": 1})
    with pytest.raises(ValueError, match="constraints is given"):
        through_scipy(bowl, START, constraints=LinearConstraint(np.eye(2)))
    with pytest.raises(TypeError, match="solver"):
        tolerax.scipy_method("line-search")  # pyright: ignore[reportArgumentType]


def test_a_function_that_is_called_as_python_code_is_logged_once(caplog):
    fun = lambda x: float(np.sum(np.asarray(x) ** 2))  # noqa: E731
    with caplog.at_level(logging.INFO, "tolerax"):
        tolerax.minimize(fun, [1.0, 1.0], method="cbo", options={"particles": 4, "max_steps": 2})
    said = [record for record in caplog.records if "called as Python code" in record.getMessage()]
    assert len(said) == 1
