"""Bad input gets an error that names the argument, the value and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.validation import check_bounds, check_start, is_concrete


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (jnp.zeros(0), ValueError, "x0 is empty"),
        ({}, ValueError, "x0 is empty"),
        (None, ValueError, "x0 is empty"),
        (jnp.array([1, 2]), TypeError, "x0 has dtype int64: cast it"),
        (3, TypeError, "x0 has dtype int64: cast it"),
        ({"a": jnp.ones(2), "b": True}, TypeError, r"x0\['b'\] has dtype bool"),
        (jnp.ones(2) * 1j, TypeError, r"x0 is complex \(complex128\).*real and imaginary"),
        ([jnp.ones(1), "two"], TypeError, r"x0\[1\] is 'two', not an array"),
        (
            {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)},
            TypeError,
            r"different dtypes \(x0\['a'\]: float64, x0\['b'\]: float32\): cast them to one",
        ),
        (np.array(["a"]), TypeError, "x0 has dtype <U1"),
        (jnp.ones(2, jnp.float16), TypeError, "x0 has dtype float16.* cast it to float32"),
        (jnp.ones(2, jnp.bfloat16), TypeError, "x0 has dtype bfloat16.* cast it to float32"),
        (np.array([None]), TypeError, "x0 has dtype object"),
    ],
)
def test_starts_that_cannot_be_used(start, error, message):
    with pytest.raises(error, match=message):
        check_start(start)


@pytest.mark.parametrize("start", [2.0, np.ones(2), {"a": [1.0, jnp.ones((2, 3))]}])
def test_starts_become_arrays(start):
    checked = check_start(start)
    assert jax.tree.structure(checked) == jax.tree.structure(start)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(checked))
    assert check_start(np.ones(2, np.float32)).dtype == jnp.float32
    # Not a number is for the run to report.
    assert np.isnan(check_start(np.array([np.nan, 1.0]))[0])


X = {"a": jnp.array(0.5), "b": jnp.zeros((2, 2))}


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        (3.0, TypeError, "bounds"),
        ((0.0, 1.0, 2.0), TypeError, "bounds"),
        ((None, 1.0), ValueError, "the lower bound is None: use -inf"),
        (({"a": 0.0}, 1.0), ValueError, "structure"),
        (({"a": 0.0, "b": jnp.zeros(3)}, 1.0), ValueError, "lower bound does not fit x0"),
        ((-1.0, {"a": 1.0, "b": jnp.nan}), ValueError, r"bounds\['b'\] holds NaN"),
        (
            (-1.0, {"a": 1.0, "b": jnp.array([[1.0, 1.0], [1.0, -2.0]])}),
            ValueError,
            r"bounds\['b'\]: the lower bound -1.0 at index \(1, 1\) is above the upper bound -2.0",
        ),
        (
            (0.6, 1.0),
            ValueError,
            r"x0\['a'\] is 0.5 at index \(\), outside its bounds \[0.6, 1.0\]",
        ),
        ((-1.0, -0.1), ValueError, r"outside .*jnp.clip"),
    ],
)
def test_bounds_that_cannot_be_used(bounds, error, message):
    with pytest.raises(error, match=message):
        check_bounds(bounds, X)


def test_bounds_take_the_shape_and_type_of_x():
    assert check_bounds(None, X) is None
    bounds = check_bounds((-1, {"a": jnp.inf, "b": 2}), X)
    assert bounds is not None
    lower, upper = bounds
    assert jax.tree.map(jnp.shape, lower) == {"a": (), "b": (2, 2)}
    assert {leaf.dtype for leaf in jax.tree.leaves((lower, upper))} == {jnp.dtype("float64")}
    np.testing.assert_array_equal(upper["b"], np.full((2, 2), 2.0))
    narrow = check_bounds((0.0, 1.0), jnp.ones(2, jnp.float32))
    assert narrow is not None
    assert narrow[0].dtype == jnp.float32
    # On the bound is inside.
    assert check_bounds((0.5, 0.5), jnp.array(0.5)) is not None


def test_values_are_left_alone_while_tracing():
    def traced(x, low):
        assert not is_concrete((x, low))
        bounds = check_bounds((low, 1.0), check_start(x))
        assert bounds is not None
        return bounds[0]

    np.testing.assert_array_equal(jax.jit(traced)(jnp.zeros(2), 0.5), [0.5, 0.5])
    assert is_concrete({"a": jnp.ones(2), "b": 3})
