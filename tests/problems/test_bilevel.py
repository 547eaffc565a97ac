"""Sums over data, and what cannot be a bilevel problem."""

import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax.problems import SumOver

DATA = {"a": jnp.ones(5), "b": jnp.arange(5.0)}


def term(y, x, item):
    return x * (y * item["a"] - item["b"]) ** 2


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batches_give_the_same_sum(reduction):
    whole = SumOver(term, DATA, reduction)
    parts = SumOver(term, DATA, reduction, batch_size=2)
    y, x = jnp.array(1.5), jnp.array(2.0)
    terms = 2.0 * (1.5 - np.arange(5.0)) ** 2
    assert float(whole(y, x)) == getattr(np, reduction)(terms)
    np.testing.assert_allclose(parts(y, x), whole(y, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"data": {"a": jnp.ones(5), "b": jnp.ones(4)}}, r"leading sizes \[\(4,\), \(5,\)\]"),
        ({"data": {"a": jnp.ones(0)}}, r"at least one item, got leading sizes \[\(0,\)\]"),
        ({"data": 1.0}, r"got leading sizes \[\(\)\]"),
    ],
)
def test_sums_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SumOver(**{"fun": term, "data": DATA} | options)


def test_levels_have_to_be_functions():
    with pytest.raises(TypeError, match="upper"):
        tolerax.Bilevel("upper", lambda y, x: y @ y, jnp.zeros(2))  # pyright: ignore
