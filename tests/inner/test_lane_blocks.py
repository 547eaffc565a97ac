"""Lanes in blocks: every lane is answered once, whatever the size of the blocks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import BatchedLevenbergMarquardt, Pointwise
from tolerax.inner.lane_blocks import AT_ONCE, in_blocks, lanes_at_once, one_by_one
from tolerax.inner.residuals import structured


@pytest.mark.parametrize("block", [None, 1, 2, 3, 7, 8])
def test_lanes_keep_their_places(block):
    a, b = jnp.arange(7.0), jnp.arange(14.0).reshape(7, 2)
    run = lambda a, b: {"sum": a + jnp.sum(b, axis=1), "rows": 2 * b}  # noqa: E731
    answer = in_blocks(run, block, None, a, b)
    np.testing.assert_array_equal(answer["sum"], a + b.sum(1))
    np.testing.assert_array_equal(answer["rows"], 2 * b)


def test_one_by_one_changes_only_the_lanes_it_is_asked_to():
    which = jnp.array([False, True, False, True, True])
    calls = []

    def run(lane, more):
        assert lane.shape == (1, 2)
        calls.append(1)
        return lane + more[:, None]

    lanes = jnp.zeros((5, 2))
    changed = one_by_one(run, which, lanes, jnp.arange(5.0))
    np.testing.assert_array_equal(changed[:, 0], [0, 1, 0, 3, 4])
    # Traced once, whatever the number of lanes.
    assert len(calls) == 1


def test_how_many_go_together_falls_with_their_size():
    fun = structured(lambda w, data: data @ w)
    together = lambda m: lanes_at_once(fun, jnp.zeros((3, 8)), jnp.zeros((3, m, 8)))  # noqa: E731
    assert together(64) == AT_ONCE // (64 * 8)
    assert together(10**6) == 1


def test_lanes_that_take_longer_end_where_they_end_alone():
    """Starts of Rosenbrock's function, near and far: some lanes go on long after most are done."""
    fun = lambda w, data: jnp.array([10 * (w[1] - w[0] ** 2), data - w[0]])  # noqa: E731
    starts = jnp.concatenate([jnp.ones((6, 2)) + 1e-3, jnp.array([[-1.2, 1.0], [-3.0, 4.0]])])
    data = jnp.ones(8)
    solve = eqx.filter_jit(lambda solver: solver(fun, starts, data, tolerance=1e-10))
    together, alone = (solve(BatchedLevenbergMarquardt(block=block)) for block in (None, 1))
    np.testing.assert_allclose(together.w, jnp.ones((8, 2)), atol=1e-8)
    np.testing.assert_array_equal(together.evaluations, alone.evaluations)
    assert int(together.evaluations[-1]) > int(together.evaluations[0]) + 2


def test_derivatives_agree_over_blocks():
    import tolerax

    keys = jax.random.split(jax.random.key(0), 2)
    Phi = jax.random.normal(keys[0], (5, 3, 40, 4))
    equation = lambda z, f: z[0] + 0.1 * z[1] ** 3 + z[2] - f  # noqa: E731
    f = jax.random.normal(keys[1], (5, 40))

    def total(f, block):
        solver = BatchedLevenbergMarquardt(block=block)
        found = tolerax.batched_least_squares(
            Pointwise(equation), jnp.zeros((5, 4)), (Phi, f), tolerance=1e-10, solver=solver
        )
        return jnp.sum(jnp.sin(found.w))

    first, second = (jax.grad(total)(f, block) for block in (None, 2))
    np.testing.assert_allclose(first, second, rtol=1e-8, atol=1e-12)
