"""The line searches: options, steepest descent, and nested problems with a known optimum."""

from typing import Any

import jax.numpy as jnp
import pytest

import tolerax
from tests.problems.truth import ridge
from tolerax import HOAG, MAID, Accuracy, Evaluation, InexactLineSearch, PointStatus, Work


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAID(shrink=2.0), "shrink is 2.0: it must lie between 0 and 1"),
        (lambda: MAID(eta=5.0), "eta is 5.0: it must lie between 0 and 1"),
        (lambda: MAID(first_step=-1.0), "first_step is -1.0: it must be positive"),
        (lambda: MAID(grow=0.5), "grow is 0.5: it must be at least 1"),
        (lambda: HOAG(tolerance=-1.0), "tolerance is -1.0: it must be positive"),
        (lambda: HOAG(decay=2.0), "decay is 2.0: it must lie between 0 and 1, or be 1"),
        (lambda: HOAG(atol=float("nan")), "atol is nan: it must not be negative"),
        (lambda: InexactLineSearch(first_step=-1.0), "first_step is -1.0: it must be positive"),
        (lambda: InexactLineSearch(max_trials=0), "max_trials is 0: it must be at least 1"),
        (lambda: InexactLineSearch(share=1.0), "share is 1.0: it must lie between 0 and 1"),
        (lambda: InexactLineSearch(rtol=jnp.nan), "rtol is nan: it must not be negative"),
        (lambda: MAID(accuracy=Accuracy(-1.0, 1.0)), "state is -1.0: it must not be negative"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("curvature", [(1e-4, 1e-4), (1e-3, 1e-2), (1e4, 1e3)])
def test_steepest_descent_finds_its_step_at_any_scale(curvature):
    problem = tolerax.Objective(lambda x: 0.5 * jnp.sum(jnp.array(curvature) * x**2))
    search = InexactLineSearch(memory=0, rtol=1e-5, atol=0.0)
    solution = tolerax.solve(problem, search, jnp.array([3.0, 4.0]))
    assert solution.success
    assert int(solution.steps) < 50


@pytest.mark.parametrize("solver", [InexactLineSearch, MAID, HOAG])
def test_a_nested_problem_is_solved_to_its_known_optimum(solver):
    solution = tolerax.solve(
        ridge(upper_smoothness=2.0), solver(rtol=1e-4, atol=0.0), jnp.array(1.0)
    )
    assert solution.status == tolerax.Status.converged
    assert abs(float(solution.x)) < 1e-3
    lower, upper = solution.interval
    assert lower <= 3 * (2 / (1 + jnp.exp(solution.x)) - 1) ** 2 <= upper


class Lopsided(tolerax.Problem):
    """A bowl whose gradient error comes from the adjoint, 1000 times what the state adds to it."""

    bounds: Any = None

    def evaluate(self, query):
        x, accuracy = query.x, query.accuracy
        zero = jnp.zeros(())
        parts = Accuracy(0.01 * accuracy.state, 10 * accuracy.adjoint)
        return Evaluation(
            value=jnp.sum(x**2),
            value_error=zero,
            gradient=2 * x,
            gradient_error=parts.total,
            gradient_error_parts=parts,
            achieved=accuracy,
            work=Work(points=1),
            status=PointStatus.ok,
        )


def test_the_tolerance_that_dominates_the_error_is_tightened():
    search = InexactLineSearch(rtol=1e-6, atol=0.0, accuracy=Accuracy(1.0, 1.0))
    solution = tolerax.solve(Lopsided(), search, jnp.array([3.0, 4.0]))
    assert solution.success
    rows = solution.history.rows()
    assert rows["adjoint_tolerance"].min() < 1e-5
    assert rows["state_tolerance"].min() > 100 * rows["adjoint_tolerance"].min()
