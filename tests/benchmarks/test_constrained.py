"""The constrained problems of the benchmark of derivative-free optimization."""

import types

import jax.numpy as jnp
import numpy as np

from benchmarks.dfo_constrained import Case, ours


def line_and_disc():
    """x + y = 1 and x^2 + y^2 <= 0.52 for x <= 0.55: (0.55, 0.45) is lowest."""
    return Case(
        "two",
        types.SimpleNamespace(
            y0=(jnp.array(0.0), jnp.array(2.0)),
            args=None,
            bounds=((jnp.array(-1.0), jnp.array(-9.0)), (jnp.array(0.55), jnp.array(9.0))),
            objective=lambda y, _: -y[0],
            constraint=lambda y: (y[0] + y[1] - 1, (0.52 - y[0] ** 2 - y[1] ** 2,)),
        ),
    )


def test_equalities_come_first_and_inequalities_are_at_least_0():
    case = line_and_disc()
    np.testing.assert_array_equal(case.lower, [0, 0])
    np.testing.assert_array_equal(case.upper, [0, np.inf])
    # x + y - 1 = 1 and 0.52 - 4 = -3.48 at the start.
    np.testing.assert_allclose(case.constraints(case.x0), [1, -3.48])
    assert case.violation(case.x0) == 3.48
    np.testing.assert_allclose(case.violation(np.array([0.8, 0.2])), 0.25)  # the bound on x


def test_a_solver_sees_values_and_they_are_counted():
    case = line_and_disc()
    x = ours(case, 300)
    np.testing.assert_allclose(x, [0.55, 0.45], atol=2e-6)
    assert 10 < len(case.points) <= 300
