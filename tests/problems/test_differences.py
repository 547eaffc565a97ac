"""Finite differences: right to within the error that they state, within bounds, honest on noise."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tolerax.problems.differences import differences, flat_bounds

EPS = float(np.finfo(float).eps)
RNG = np.random.default_rng(7)
FACTOR = RNG.normal(size=(20, 20))
HESSIAN = FACTOR.T @ FACTOR
DENSE = np.ones((20, 20)) + np.eye(20)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def rosenbrock_gradient(x):
    bend = x[1] - x[0] ** 2
    return np.array([-400 * x[0] * bend - 2 * (1 - x[0]), 200 * bend])


FUNCTIONS = {
    "rosenbrock": (2, rosenbrock, rosenbrock_gradient),
    "random Hessian": (20, lambda x: 0.5 * x @ HESSIAN @ x + 1, lambda x: HESSIAN @ x),
    "all coupled": (20, lambda x: 0.5 * x @ DENSE @ x, lambda x: DENSE @ x),
    "exponentials": (5, lambda x: np.exp(x).sum(), np.exp),
    "large offset": (5, lambda x: x @ x + 1e6, lambda x: 2 * x),
    "quartic": (5, lambda x: (x**4).sum(), lambda x: 4 * x**3),
}


def approximate(fun, x, *, precision=EPS, lower=None, upper=None, **options):
    x = np.asarray(x)
    return differences(
        lambda y: float(fun(y)),
        x,
        float(fun(x)),
        precision=precision,
        lower=np.full(x.size, -np.inf) if lower is None else np.asarray(lower),
        upper=np.full(x.size, np.inf) if upper is None else np.asarray(upper),
        **options,
    )


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 1000), size=st.sampled_from([1.0, 1e-2, 3.0]))
def test_the_stated_error_covers_the_true_one(name, central, seed, size):
    n, fun, gradient = FUNCTIONS[name]
    x = size * np.random.default_rng(seed).normal(size=n)
    found = approximate(fun, x, central=central)
    error = np.linalg.norm(found.gradient - gradient(x))
    # An estimate: within a factor of 2, and to rounding of the gradient itself. Third derivatives
    # are guessed from the second: for small x the quartic has larger ones, times h^2 = 4e-11.
    assert error <= 2 * found.error + 10 * EPS * np.linalg.norm(gradient(x)) + 2e-11
    assert found.calls <= (2 * n + 1 if central else 3 * n + 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stated_error_is_not_far_above_the_true_one(name):
    n, fun, gradient = FUNCTIONS[name]
    loose = []
    for seed in range(9):
        x = np.random.default_rng(seed).normal(size=n)
        found = approximate(fun, x)
        loose.append(found.error / np.linalg.norm(found.gradient - gradient(x)))
        assert found.calls == n + 1
    assert np.median(loose) < 50


def test_a_tolerance_below_the_forward_error_brings_central_differences():
    x = np.array([-1.2, 1.0])
    forward = approximate(rosenbrock, x)
    central = approximate(rosenbrock, x, tolerance=0.1 * forward.error)
    assert forward.calls == 2 + 1
    assert central.calls == forward.calls + 4 + 1
    assert central.error < 0.1 * forward.error
    only = approximate(rosenbrock, x, central=True)
    assert only.calls == 4 + 1
    np.testing.assert_array_equal(only.gradient, central.gradient)


def test_noise_shows_in_the_error():
    for size in (1e-10, 1e-6, 1e-3):
        rng = np.random.default_rng(3)
        for central, step in ((False, EPS**0.5), (True, EPS ** (1 / 3))):
            noisy = lambda x, s=size, rng=rng: x @ x + s * rng.normal()  # noqa: E731
            found = approximate(noisy, np.ones(4), central=central)
            assert 0.1 * size / step < found.error < 100 * size / step


def test_values_that_do_not_resolve_the_step_show_in_the_error():
    # Float32 in disguise: at 13 its spacing is 1e-6, the change over a step 1e-7.
    coarse = lambda x: float(np.float32(x @ x + 5))  # noqa: E731
    x = np.array([2.0, 2.0])
    found = approximate(coarse, x, central=True)
    error = np.linalg.norm(found.gradient - 2 * x)
    assert error < 30 * found.error
    constant = approximate(lambda x: 3.0, np.ones(3))
    np.testing.assert_array_equal(constant.gradient, 0)
    assert constant.error > 1e4
    steps = approximate(lambda x: np.floor(x @ x), np.array([1.1, 0.7]))
    assert steps.error > 1e4


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    below=st.lists(st.sampled_from([0.0, 1e-300, 1e-12, 1e-6, 1.0]), min_size=3, max_size=3),
    above=st.lists(st.sampled_from([0.0, 1e-300, 1e-12, 1e-6, 1.0]), min_size=3, max_size=3),
    central=st.booleans(),
)
def test_no_value_is_taken_outside_the_bounds(below, above, central):
    x = np.array([1.0, -3.0, 0.0])
    lower, upper = x - below, x + above
    seen = []

    def fun(y):
        seen.append(y)
        return y @ y

    found = approximate(fun, x, lower=lower, upper=upper, central=central)
    assert all(np.all((y >= lower) & (y <= upper)) for y in seen)
    fixed = upper - lower == 0
    np.testing.assert_array_equal(found.gradient[fixed], 0)
    room = np.maximum(upper - x, x - lower)
    assert np.all(np.abs(found.gradient - 2 * x)[room >= 1e-6] < 1e-3)


def test_the_other_side_of_a_value_that_is_not_finite():
    for bad in (np.nan, np.inf):
        for central in (False, True):
            fun = lambda x, bad=bad: bad if x[0] > 1 or x[1] < 2 else x @ x  # noqa: E731
            found = approximate(fun, np.array([1.0, 2.0]), central=central)
            np.testing.assert_allclose(found.gradient, [2.0, 4.0], atol=1e-6)
            nowhere = lambda x, bad=bad: x @ x if x[0] == 1.0 else bad  # noqa: E731
            found = approximate(nowhere, np.array([1.0, 2.0]), central=central)
            assert np.isnan(found.gradient[0])
            np.testing.assert_allclose(found.gradient[1], 4.0, atol=1e-6)


def test_steps_follow_the_size_of_x_and_the_precision_of_values():
    assert np.all(np.isfinite(approximate(lambda x: x @ x, np.array([1e100, 1.0])).gradient))
    x = np.array([1.0, 2.0], np.float32)
    found = approximate(lambda x: x.astype(float) @ x, x, precision=float(np.finfo(np.float32).eps))
    np.testing.assert_allclose(found.gradient, 2 * x, atol=found.error)
    assert found.error < 1e-2


def test_bounds_as_vectors():
    leaves = [np.zeros(2), np.zeros((1, 2))]
    low, high = flat_bounds(None, leaves)
    assert np.all(low == -np.inf)
    assert np.all(high == np.inf)
    low, high = flat_bounds((-1.0, [np.ones(2), 5.0]), leaves)
    np.testing.assert_array_equal(low, [-1, -1, -1, -1])
    np.testing.assert_array_equal(high, [1, 1, 5, 5])
