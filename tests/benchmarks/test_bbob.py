"""The functions of BBOB: minima where they are said to be, and values known from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bbob

VALUE = jax.jit(bbob.value)


@pytest.mark.parametrize("kind", bbob.FUNCTIONS)
def test_the_minimum_is_where_it_is_said_to_be(kind):
    p = bbob.instance(kind, 3, 5)
    lowest = float(VALUE(p, p.x_opt))
    # Schwefel's function has its minimum at a number given to 10 digits.
    assert lowest == pytest.approx(float(p.f_opt), abs=1e-7)
    x = np.random.default_rng(kind).uniform(-5, 5, (100, 5))
    near = np.clip(np.asarray(p.x_opt)[None] + 1e-2 * x, -5, 5)
    assert np.all(jax.vmap(lambda x: bbob.value(p, x))(jnp.concatenate([x, near])) > lowest - 1e-9)


def test_instances_are_those_of_the_definition():
    """`f_opt` of the functions 1, 8, 15, 21, 24, instance 1, as the `ioh` package gives them."""
    known = {1: 79.48, 8: 149.15, 15: 1000.0, 21: 40.78, 24: 102.61}
    for kind, f_opt in known.items():
        assert float(bbob.instance(kind, 1, 5).f_opt) == pytest.approx(f_opt, abs=1e-9)
