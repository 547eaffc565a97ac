"""P0's closed form against automatic differentiation and a dense solve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerax.problems.library import quadratic

P = quadratic(seed=1, n=60, d=4)
# f is about 1e2 here and the condition number of A2'A2 below 1e3, so that closed form and dense
# solve agree to about 1e3 * 1e2 * 2e-16.
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@settings(max_examples=8)
@given(x=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_solution_value_and_gradient(x):
    x = jnp.array(x)

    def solve(x):
        """One Newton step from 0 solves a quadratic."""
        zero = jnp.zeros(4)
        return -jnp.linalg.solve(jax.hessian(P.lower)(zero, x), jax.grad(P.lower)(zero, x))

    close(P.solution(x), solve(x))
    np.testing.assert_allclose(jax.grad(P.lower)(P.solution(x), x), 0, atol=1e-10)
    value, gradient = jax.value_and_grad(lambda x: P.upper(solve(x), x))(x)
    close(P.value(x), value)
    np.testing.assert_allclose(P.gradient(x), gradient, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(P.gradient(x), jax.grad(P.value)(x), rtol=1e-8, atol=1e-8)


@settings(max_examples=20)
@given(d=st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_nothing_lies_below_the_optimum(d):
    np.testing.assert_allclose(P.gradient(P.optimum), 0, atol=1e-9)
    assert P.value(P.optimum + jnp.array(d)) >= P.value(P.optimum) - 1e-12


def test_the_optimum_is_the_noise():
    """Without noise the data are reached exactly, by the x that made them."""
    exact = quadratic(seed=1, n=60, d=4, noise=0.0)
    assert exact.value(exact.optimum) < 1e-20
    assert 0.5 * 1e-4 * 40 < P.value(P.optimum) < 0.5 * 1e-4 * 90
    assert P.value(P.x0) > 1.0


def test_float32_constants_bound_the_rounded_problem():
    p = quadratic(seed=1, n=60, d=4, dtype=jnp.float32)
    A2 = np.asarray(p.lower.A2, np.float64)  # pyright: ignore[reportFunctionMemberAccess]
    assert float(p.constants["strong_convexity"].value) <= np.linalg.eigvalsh(A2.T @ A2)[0]


def test_a_singular_lower_level_is_refused(monkeypatch):
    monkeypatch.setattr("tolerax.problems.library.closed_form.generator", lambda *_: Ones())
    with pytest.raises(ValueError, match="A2 is singular"):
        quadratic(n=20, d=2)


class Ones:
    """A generator without variety."""

    def uniform(self, size):
        return np.ones(size)

    normal = uniform
