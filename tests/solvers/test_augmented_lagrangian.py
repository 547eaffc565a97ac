"""Known solutions are reached with and without second derivatives, and what has none says so."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import tolerax
from tests.solvers import constrained
from tests.solvers.constrained import CASES

SOLVABLE = [name for name, case in CASES.items() if not np.isnan(case.value)]
SOLVERS = {
    "second order": tolerax.ExactAugmentedLagrangian(),
    "by gradients": tolerax.ExactAugmentedLagrangian(second_order=False),
}


def solve(name, solver="second order", **options):
    problem, start = constrained.problem(name)
    return problem, tolerax.solve(problem, SOLVERS[solver], start, max_steps=300, **options)


RUNS = [(name, "second order") for name in SOLVABLE]
RUNS += [(name, "by gradients") for name in ("7", "42", "43", "71", "76")]


@pytest.mark.parametrize(("name", "solver"), RUNS)
def test_reaches_a_known_solution(name, solver):
    problem, solution = solve(name, solver)
    case = CASES[name]
    assert bool(solution.success), solution.message
    # What was claimed, without the library: both tolerances are 1e-6, and twice that is the second
    # look's; multipliers of the fit are the best, so its residual is at most ours.
    violation, slope = constrained.optimality(problem, solution.x, 1e-5)
    assert violation <= 1e-6
    assert slope <= 3e-6
    # A value differs by the multipliers times the violation; those here are at most 150.
    np.testing.assert_allclose(solution.value, case.value, rtol=1e-6, atol=2e-4)
    if case.x is not None:
        # The flattest of these problems has a curvature of about 0.01 along its constraints.
        np.testing.assert_allclose(solution.x[: len(case.x)], case.x, atol=2e-3)


def test_gradients_that_nearly_agree_take_few_points():
    """A step to where both linearized constraints hold is 10,000 times as long as x (of SciPy's
    methods, SLSQP takes 391 evaluations and trust-constr 32: BYRDSPHR in `benchmarks cutest`)."""
    _, solution = solve("two spheres")
    assert bool(solution.success)
    assert int(solution.work.points) <= 20


def test_steps_to_a_double_root_are_extrapolated():
    """Newton's steps halve there: eleven of them would leave a violation below 1e-6."""
    problem = tolerax.Objective(
        lambda x: (x[0] - 1) ** 2 + x[1] ** 2,
        constraints=lambda x: (x[:1] - 1) ** 2,
        constraint_bounds=(0.0, 0.0),
    )
    solution = tolerax.solve(problem, SOLVERS["second order"], jnp.array([3.0, 1.0]))
    assert bool(solution.success)
    assert int(solution.work.points) <= 8
    np.testing.assert_allclose(solution.x, [1, 0], atol=1e-3)


def test_steps_follow_curved_constraints_to_second_order():
    """From a circle a straight step d leaves it by |d|^2, one that bends with it by a higher order:
    half the step, an eighth of the violation but for what is of higher order still."""
    circle = tolerax.Objective(
        lambda x: x[0], constraints=lambda x: x @ x, constraint_bounds=(1.0, 1.0)
    )

    def first_trial(angle):
        asked = []
        start = jnp.array([-np.cos(angle), np.sin(angle)])
        remember = lambda step: asked.append(np.asarray(step.query.x))  # noqa: E731
        tolerax.solve(circle, SOLVERS["second order"], start, max_steps=2, callback=remember)
        return np.linalg.norm(asked[1] - asked[0]), abs(asked[1] @ asked[1] - 1)

    (step, violation), (half, less) = first_trial(0.2), first_trial(0.1)
    assert 1.8 < step / half < 2.2
    assert 0 < less <= violation / 7


def test_a_first_trial_is_short_where_constraints_bend_far_more():
    """The minimum lies a step of 1 along the tangent, where the parabola is 50 above it."""
    parabola = tolerax.Objective(
        lambda x: (x[0] - 1) ** 2 + x[1] ** 2,
        constraints=lambda x: x[1] - 50 * x[0] ** 2,
        constraint_bounds=(0.0, 0.0),
    )
    asked = []
    solution = tolerax.solve(
        parabola,
        SOLVERS["second order"],
        jnp.zeros(2),
        callback=lambda step: asked.append(np.asarray(step.query.x)),
    )
    assert bool(solution.success)
    # The step is (1, 0), the bend (0, 50): for a step of a twenty-fifth it is twice as long.
    np.testing.assert_allclose(asked[1], [0.04, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("leaves", [3, 5])
def test_constraints_that_lose_their_slopes_at_the_solution(leaves):
    """The largest stable set of a star, all its leaves, in the relaxation of CUTEst's MSS1: where
    two vertices are out, the product that keeps their neighbours apart has no slope, and its
    multiplier may be anything."""
    center, leaf = np.zeros(leaves, int), 1 + np.arange(leaves)

    def apart(z):
        meet = jnp.sum(z[:, center] * z[:, leaf], axis=0)
        return jnp.append(meet, jnp.sum(z * z))

    problem = tolerax.Objective(
        lambda z: -jnp.sum(jnp.sum(z, axis=1) ** 2),
        constraints=apart,
        constraint_bounds=(jnp.eye(leaves + 1)[-1], jnp.eye(leaves + 1)[-1]),
    )
    start = jnp.asarray(1 + 0.2 * np.random.default_rng(0).standard_normal((2, leaves + 1)))
    solution = tolerax.solve(problem, SOLVERS["second order"], start, max_steps=40)
    assert bool(solution.success), solution.message
    # Values differ by multipliers of about ten times a violation of 1e-6.
    np.testing.assert_allclose(solution.value, -leaves, atol=1e-5)


@pytest.mark.parametrize("name", ["infeasible", "two lines"])
def test_an_infeasible_problem_is_named_with_its_violation(name):
    _, solution = solve(name)
    assert bool(solution.status == tolerax.Status.infeasible)
    # x^2 + 1 is 1 at best; of two lines at a distance one is missed by at least half of it, 1.
    assert 1 - 1e-6 <= float(solution.violation) <= 2 + 1e-6


@pytest.mark.parametrize("start", [(0.3, 0.0), (0.0, 0.0), (1e-9, -1.0)])
def test_a_saddle_of_the_violation_is_no_end(start):
    """The least of the objective, 0, and Newton's steps on `x_1 = 0` lead where `x_0^2 - x_1^2` is
    as near to -1/2 as first derivatives can tell; it is met at `(0, +-sqrt(1/2))`."""
    problem = tolerax.Objective(
        lambda x: jnp.sum(x**2),
        constraints=lambda x: x[0] ** 2 - x[1] ** 2,
        constraint_bounds=(-0.5, -0.5),
        bounds=(-jnp.ones(2), jnp.ones(2)),
    )
    solution = tolerax.solve(problem, SOLVERS["second order"], jnp.array(start), max_steps=100)
    assert bool(solution.success), solution.message
    np.testing.assert_allclose(jnp.abs(solution.x), [0, jnp.sqrt(0.5)], atol=1e-5)


def test_work_is_counted():
    def solve(points):
        problem, start = constrained.alone("71")
        return tolerax.solve(problem, SOLVERS["second order"], start, max_work={"points": points})

    solution = solve(300)
    assert bool(solution.success)
    assert int(solution.work.points) == int(solution.steps)
    assert int(solution.work.hessian_products) >= len(CASES["71"].start)
    few = solve(3)
    assert int(few.work.points) == 3
    assert bool(few.status == tolerax.Status.budget)


def test_points_stay_within_the_bounds():
    asked = []
    problem, start = constrained.alone("71")
    tolerax.solve(
        problem,
        SOLVERS["second order"],
        start,
        callback=lambda step: asked.append(np.asarray(step.query.x)),
    )
    assert len(asked) > 3
    assert all(np.all((x >= 1) & (x <= 5)) for x in asked)


def test_minimize_takes_the_constraints_of_scipy():
    def fun(x):
        return x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2]

    constraints = [
        {"type": "ineq", "fun": lambda x: x[0] * x[1] * x[2] * x[3] - 25},
        scipy.optimize.NonlinearConstraint(lambda x: x @ x, 40, 40),
        scipy.optimize.LinearConstraint(np.array([[1.0, 0.0, 0.0, 0.0]]), -np.inf, 1.5),
    ]
    # The method for constraints is the default where there are some.
    result = tolerax.minimize(
        fun, [1.0, 5.0, 5.0, 1.0], bounds=[(1, 5)] * 4, constraints=constraints
    )
    assert result.success
    np.testing.assert_allclose(result.fun, CASES["71"].value, atol=1e-6)
    np.testing.assert_allclose(result.x, CASES["71"].x, atol=1e-5)


@pytest.mark.parametrize("jac", [None, "3-point", "given"])
def test_minimize_takes_constraints_that_jax_cannot_trace(jac):
    """Python code (the conversions to float see to that), with Jacobians of all kinds."""
    asked = []

    def fun(x):
        return float(x[0]) * x[3] * (x[0] + x[1] + x[2]) + x[2]

    def slope(x):
        total = x[0] + x[1] + x[2]
        return np.array([x[3] * (total + x[0]), x[0] * x[3], x[0] * x[3] + 1, x[0] * total])

    def product(x, target):
        asked.append(np.array(x))
        return float(np.prod(x)) - target

    of_product = (lambda x, target: np.prod(x) / x) if jac == "given" else jac
    of_sphere = (lambda x: 2 * x[None]) if jac == "given" else jac or "2-point"
    sphere = lambda x: float(np.sum(x**2))  # noqa: E731
    constraints = [
        {"type": "ineq", "fun": product, "args": (25.0,), "jac": of_product},
        scipy.optimize.NonlinearConstraint(sphere, 40, 40, jac=of_sphere),
        scipy.optimize.LinearConstraint(np.array([[1.0, 0.0, 0.0, 0.0]]), -np.inf, 1.5),
    ]
    result = tolerax.minimize(
        fun,
        [1.0, 5.0, 5.0, 1.0],
        method="sqp",
        jac=slope,
        bounds=[(1, 5)] * 4,
        constraints=constraints,
    )
    assert result.success
    assert ("estimated" in result.message) == (jac != "given")
    np.testing.assert_allclose(result.fun, CASES["71"].value, atol=1e-6)
    np.testing.assert_allclose(result.x, CASES["71"].x, atol=1e-5)
    assert all(np.all((x >= 1) & (x <= 5)) for x in asked)


def test_an_infeasible_problem_of_minimize_says_by_how_much():
    constraint = {"type": "eq", "fun": lambda x: x @ x + 1}
    result = tolerax.minimize(lambda x: x @ x, [3.0, 1.0], method="sqp", constraints=constraint)
    assert result.status_name == "infeasible"
    np.testing.assert_allclose(result.maxcv, 1.0, atol=1e-3)
    assert "The least violation seen is 1." in result.message


def test_what_is_not_used_of_a_constraint_of_scipy_is_said():
    def minimize(**options):
        constraint = scipy.optimize.NonlinearConstraint(lambda x: x[0], 1, 1, **options)
        bounds = [(1.0, 1.0)]
        return tolerax.minimize(lambda x: x[0] ** 2, [1.0], bounds=bounds, constraints=constraint)

    with pytest.raises(ValueError, match=r"constraints\[0\] has finite_diff_rel_step=0\.01"):
        minimize(finite_diff_rel_step=0.01)
    with pytest.warns(UserWarning, match=r"constraints\[0\] has hess, which is not used"):
        minimize(hess=lambda x, v: np.zeros((1, 1)))


def test_a_jacobian_of_scipy_that_is_not_known_is_named():
    constraint = {"type": "eq", "fun": lambda x: float(x[0]), "jac": "cs"}
    with pytest.raises(ValueError, match=r"constraints\[0\]: jac is 'cs'"):
        tolerax.minimize(lambda x: float(x[0]), [1.0], method="sqp", constraints=constraint)


def test_options_are_checked():
    with pytest.raises(ValueError, match="atol is -1"):
        tolerax.ExactAugmentedLagrangian(atol=-1.0)
    with pytest.raises(ValueError, match="eta is"):
        tolerax.ExactAugmentedLagrangian(eta=(0.0, 0.1))
    with pytest.raises(ValueError, match=r"forcing is 2\.0"):
        tolerax.ExactAugmentedLagrangian(forcing=2.0)
    with pytest.raises(TypeError, match=r"linear is MINRES.*KrylovKKT"):
        tolerax.ExactAugmentedLagrangian(linear=tolerax.inner.MINRES())


def test_a_tolerance_below_rounding_ends_at_the_floor():
    problem = tolerax.Objective(
        lambda x: jnp.sum(jnp.exp(x)), constraints=lambda x: x @ x, constraint_bounds=(1.0, 1.0)
    )
    solver = tolerax.ExactAugmentedLagrangian(atol=1e-12)
    solution = tolerax.solve(problem, solver, jnp.array([0.7, -0.3, 0.2], jnp.float32))
    assert bool(solution.status == tolerax.Status.accuracy_floor)
    assert int(solution.steps) <= 25
    np.testing.assert_allclose(solution.x, -(3**-0.5), atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "remedy"),
    [
        (tolerax.ExactAugmentedLagrangian(second_order=False), "second derivatives"),
        (tolerax.ExactAugmentedLagrangian(linear=tolerax.inner.DenseKKT()), "KrylovKKT"),
        (tolerax.ExactAugmentedLagrangian(linear=tolerax.inner.SketchAndProject()), "KrylovKKT"),
    ],
)
def test_a_matrix_that_does_not_fit_into_memory_is_not_made(solver, remedy):
    problem = tolerax.Objective(
        lambda x: jnp.sum(x**2), constraints=jnp.sum, constraint_bounds=(1.0, 1.0)
    )
    with pytest.raises(ValueError, match=rf"would take 298 GiB.*{remedy}"):
        tolerax.solve(problem, solver, jnp.ones(200_000))
