"""Every status that a solver can end with is reached, each by a run that deserves it."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.registry import SOLVERS
from tolerax.minimize import CODES


def converged(solver):
    return zoo.run(zoo.objective("quadratic"), solver(), jnp.asarray(zoo.START))


def converged_estimated(solver):
    problem = zoo.python_objective("quadratic", gradient="3-point")
    return zoo.run(problem, solver(), jnp.asarray(zoo.START))


def budget(solver):
    problem = zoo.python_objective("quadratic")
    solution = zoo.run(problem, solver(), jnp.asarray(zoo.START), max_work={"points": 2})
    assert int(solution.work.points) == 2
    return solution


def budget_of_time(solver):
    def slow(x):
        time.sleep(0.02)
        return zoo.quadratic(x)

    problem = zoo.python_objective("quadratic", fun=slow)
    began = time.perf_counter()
    solution = zoo.run(problem, solver(), jnp.asarray(zoo.START), max_seconds=0.01)
    assert time.perf_counter() - began < 60
    assert 1 <= int(solution.steps) <= 2
    return solution


def stopped(solver):
    def callback(step):
        if step.number == 2:
            raise StopIteration

    problem = zoo.python_objective("quadratic")
    solution = zoo.run(problem, solver(), jnp.asarray(zoo.START), callback=callback)
    assert int(solution.steps) == 2
    return solution


def non_finite_start(solver):
    solution = zoo.run(zoo.objective("always_nan"), solver(), jnp.asarray(zoo.START))
    assert "evaluations failed" in solution.message
    assert int(solution.steps) <= 2
    return solution


def not_reproduced(solver):
    seen = set()

    def again(x):
        """Higher where it was called before: only the second look at the end can tell."""
        known = x.tobytes() in seen
        seen.add(x.tobytes())
        return zoo.quadratic(x) + 1e-3 * known

    problem = zoo.python_objective("quadratic", fun=again)
    return zoo.run(problem, solver(), jnp.asarray(zoo.START))


def unbounded(solver):
    return zoo.run(zoo.objective("unbounded"), solver(), jnp.asarray(zoo.START))


def gradient_inconsistent(solver):
    problem = zoo.objective("quadratic", fault="flipped")
    return zoo.run(problem, solver(), jnp.asarray(zoo.START))


def stalled(solver):
    def pit(x):
        """The start lies in a hole that its gradient knows nothing of."""
        return zoo.quadratic(x) + (0.0 if tuple(x) == zoo.START else 50.0)

    problem = zoo.python_objective("quadratic", fun=pit)
    solution = zoo.run(problem, solver(), jnp.asarray(zoo.START))
    np.testing.assert_array_equal(solution.x, zoo.START)
    return solution


def rough(outcome):
    def case(solver):
        problem = zoo.Rough(100.0, outcome)
        return zoo.run(problem, solver(), jnp.asarray(zoo.START))

    return case


CASES = {
    "converged": converged,
    "converged_estimated": converged_estimated,
    "budget": budget,
    "time": budget_of_time,
    "stopped": stopped,
    "non_finite_start": non_finite_start,
    "not_reproduced": not_reproduced,
    "unbounded": unbounded,
    "gradient_inconsistent": gradient_inconsistent,
    "stalled": stalled,
    "accuracy_floor": rough(tolerax.PointStatus.floor),
    "inner_failed": rough(tolerax.PointStatus.inaccurate),
    "contradicted": rough(tolerax.PointStatus.contradicted),
}


@pytest.mark.parametrize(
    ("entry", "status"),
    [(entry, status) for entry in SOLVERS for status in sorted(entry.statuses)],
    ids=str,
)
def test_status_is_reached(entry, status):
    solution = CASES[status](lambda: entry.solver(**entry.to_reach(status)))
    assert zoo.name_of(solution.status) == status
    assert bool(solution.success) == status.startswith("converged")
    assert solution.message.startswith(tolerax.Status[getattr(tolerax.Status, status)])


def test_every_status_has_a_code_and_a_message_that_says_what_to_do():
    assert set(tolerax.Status._name_to_item) - {"running"} == set(CODES)
    for name in CODES:
        assert len(tolerax.Status[getattr(tolerax.Status, name)]) > 30
    assert len(set(CODES.values())) == len(CODES) - 3  # all four kinds of success are 0
    assert [name for name, code in CODES.items() if code == 0] == [
        "converged",
        "converged_estimated",
        "consensus",
        "sampled",
    ]
