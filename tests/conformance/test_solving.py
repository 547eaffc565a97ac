"""Known minima are reached, with what users may pass: bounds, pytrees, jit, vmap, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.registry import FAMILIES, SOLVERS

pytestmark = pytest.mark.accelerator

every_solver = pytest.mark.parametrize("entry", SOLVERS, ids=str)
every_family = pytest.mark.parametrize("entry", FAMILIES, ids=str)

SOLVED = [(entry, name) for entry in SOLVERS for name in sorted(entry.solves)]
# |gradient| <= 1e-6 + 1e-8 |gradient at x0| at the default tolerances, with a factor of 2 for the
# second look; the smallest curvature along which the functions of the zoo can move is 0.4.
CURVATURE = 0.4


def criterion(name: str, known: zoo.Known) -> float:
    x = np.asarray(known.start)
    start = zoo.stationarity(zoo.true_gradient(name, x), x, known.lower, known.upper)
    return 2 * (1e-6 + 1e-8 * start)


@pytest.mark.parametrize(("entry", "name"), SOLVED, ids=lambda case: str(case))
def test_reaches_a_known_minimum(entry, name):
    known = zoo.PROBLEMS[name]
    problem = zoo.objective(known.fun, known=known)
    solution = zoo.run(problem, entry.solver(), jnp.asarray(known.start))
    assert zoo.name_of(solution.status) == "converged"
    assert solution.success
    tolerance = criterion(known.fun, known)
    x = np.asarray(solution.x)
    assert np.all((x >= known.lower) & (x <= known.upper))
    np.testing.assert_allclose(x, known.minimum, atol=tolerance / CURVATURE)
    gradient = zoo.true_gradient(known.fun, x)
    assert zoo.stationarity(gradient, x, known.lower, known.upper) <= tolerance
    # Up to rounding where the compiler joins operations: terms of size 100 at most.
    value = float(zoo.Python(known.fun).fun(x))
    np.testing.assert_allclose(solution.value, value, rtol=1e-12, atol=1e-20)
    np.testing.assert_allclose(solution.gradient, gradient, rtol=1e-12, atol=1e-12)
    free = zoo.stationarity(gradient, x, known.lower, known.upper)
    np.testing.assert_allclose(solution.gradient_norm, free, atol=1e-12)


@every_solver
def test_keeps_within_the_bounds_at_every_query(entry):
    for name in ("bounded", "half_bounded", "bounded_rosenbrock"):
        known = zoo.PROBLEMS[name]
        seen = zoo.Recorded(zoo.Python(known.fun).fun)
        asked: list[np.ndarray] = []
        problem = zoo.python_objective(
            known.fun, fun=seen, bounds=(jnp.asarray(known.lower), jnp.asarray(known.upper))
        )
        if not entry.honours_bounds:
            with pytest.raises(ValueError, match="does not honour bounds"):
                zoo.run(problem, entry.solver(), jnp.asarray(known.start))
            continue

        def callback(step, asked=asked):
            asked.append(np.atleast_2d(step.query.x))

        zoo.run(problem, entry.solver(), jnp.asarray(known.start), callback=callback)
        # Newton's method: the start, one step, and a second look.
        assert len(asked) > (2 if entry.solver().uses_hessian else 3)
        for x in [*seen.points, *np.concatenate(asked)]:
            assert np.all((x >= known.lower) & (x <= known.upper))


@every_solver
def test_evaluates_no_point_twice_in_a_row(entry):
    # Except for the second look at the point that is returned.
    seen = zoo.Recorded(zoo.quadratic)
    problem = zoo.python_objective("quadratic", fun=seen)
    solution = zoo.run(problem, entry.solver(), jnp.asarray(zoo.START))
    repeated = [bool(np.all(a == b)) for a, b in zip(seen.points, seen.points[1:], strict=False)]
    assert entry.looks_twice or sum(repeated[:-1]) == 0
    assert repeated[-1]
    assert len(seen.points) == int(solution.work.points) == int(solution.steps)


def tree(x):
    """The four variables of the tree problem as a vector."""
    return jnp.concatenate([x["scalar"][None], x["pair"]["matrix"].ravel()])


CENTRES = np.array([1.0, -2.0, 0.5, 3.0, -1.0])


@every_family
def test_takes_pytrees_with_scalars_and_matrices(entry):
    def fun(x):
        return jnp.sum(jnp.arange(1.0, 6.0) * (tree(x) - CENTRES) ** 2)

    start = {"scalar": jnp.array(4.0), "pair": {"matrix": jnp.ones((2, 2))}}
    upper = {"scalar": jnp.inf, "pair": {"matrix": jnp.full((2, 2), 2.0)}}
    lower = jax.tree.map(lambda leaf: jnp.full_like(leaf, -10.0), start)
    problem = tolerax.Objective(fun, bounds=(lower, upper))
    solution = zoo.run(problem, entry.solver(), start)
    assert solution.success
    assert jax.tree.structure(solution.x) == jax.tree.structure(start)
    assert jax.tree.structure(solution.gradient) == jax.tree.structure(start)
    assert solution.x["pair"]["matrix"].shape == (2, 2)
    # The curvature is at least 2, the gradient at the start at most 40: see `criterion`.
    np.testing.assert_allclose(tree(solution.x), np.minimum(CENTRES, 2.0), atol=2e-6)


@every_family
def test_a_batch_of_starts_equals_single_runs(entry):
    known = zoo.PROBLEMS["bounded"]
    problem, solver = zoo.objective(known.fun, known=known), entry.solver()
    starts = jnp.array([zoo.START, (2.0, -1.0), (6.0, 5.0), (2.5, -0.5), (jnp.nan, 0.0)])
    batch = jax.jit(jax.vmap(lambda x: zoo.run(problem, solver, x)))(starts)
    for i, start in enumerate(starts):
        single = zoo.run(problem, solver, start)
        # The same operations; only their fusion may differ.
        np.testing.assert_allclose(batch.x[i], single.x, rtol=1e-12)
        assert int(batch.steps[i]) == int(single.steps)
        assert (batch.status == single.status)[i]
        assert int(batch.work.points[i]) == int(single.work.points)


@every_family
def test_float32_stays_float32_and_says_what_it_cannot_resolve(entry):
    start = jnp.asarray(zoo.START, jnp.float32)
    problem = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf,
        zoo.objective("third"),
    )
    solution = zoo.run(problem, entry.solver(jnp.float32, rtol=0.0, atol=1e-3), start)
    assert solution.success
    assert {leaf.dtype for leaf in (solution.x, solution.value, solution.gradient)} == {start.dtype}
    # x is known to 2e-8 at best and the curvature is 1, so nobody can know a gradient to 1e-12.
    solution = zoo.run(problem, entry.solver(jnp.float32, rtol=0.0, atol=1e-12), start)
    assert zoo.name_of(solution.status) in ("accuracy_floor", "stalled", "budget")
    np.testing.assert_allclose(solution.x, 1 / 3, atol=1e-3)


@every_solver
def test_starts_at_the_minimum(entry):
    solution = zoo.run(zoo.objective("quadratic"), entry.solver(), jnp.asarray(zoo.CENTRE))
    assert solution.success
    np.testing.assert_array_equal(solution.x, zoo.CENTRE)
    assert int(solution.steps) <= 3


@every_family
def test_honest_errors_are_resolved_and_the_truth_lies_within_them(entry):
    if "accuracy_floor" not in entry.statuses:
        pytest.skip("keeps to a schedule of tolerances")
    problem = zoo.Rough(0.0)
    solution = zoo.run(problem, entry.solver(), jnp.asarray(zoo.START))
    low, high = solution.interval
    assert low <= zoo.quadratic(solution.x) <= high
    error = np.linalg.norm(solution.gradient - zoo.quadratic_gradient(np.asarray(solution.x)))
    assert error <= solution.gradient_error * (1 + 1e-12)
    rows = solution.history.rows()
    assert np.all(rows["value_error"] >= 0)
    if zoo.name_of(solution.status) == "converged":
        np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=1e-6)
