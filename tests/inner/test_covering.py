"""The covering oracle against exhaustive search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import farthest_points

KEY = jax.random.key(0)


def gap(points, seen):
    """The distance of each point to the nearest seen one."""
    return np.sqrt(((points[:, None] - seen[None]) ** 2).sum(axis=2)).min(axis=1)


def grid(low, high, size):
    axes = [np.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, len(axes))


@pytest.mark.parametrize(("n", "size", "share"), [(1, 4001, 0.98), (2, 401, 0.93), (3, 61, 0.85)])
def test_distances_are_nearly_the_largest_possible(n, size, share):
    # Of 100 other cases the worst had 0.996, 0.947 and 0.862 of the largest distance.
    find = jax.jit(functools.partial(farthest_points, count=1))
    for seed in range(5):
        random = np.random.default_rng(seed)
        seen = random.uniform(-2, 2, (40, n))
        center, radius = random.uniform(-0.5, 0.5, n), random.uniform(0.5, 2.0, n)
        lower = np.maximum(center - 2, -1.0)
        found = find(
            jax.random.fold_in(KEY, seed), jnp.array(center), radius, jnp.array(seen), lower=lower
        )
        low, high = np.maximum(center - radius, lower), center + radius
        points = np.asarray(found.points)
        assert np.all((points >= low - 1e-12) & (points <= high + 1e-12))
        np.testing.assert_allclose(found.distance, gap(points / radius, seen / radius), rtol=1e-12)
        best = gap(grid(low, high, size) / radius, seen / radius).max()
        assert float(found.distance[0]) >= share * best


def test_a_batch_keeps_its_distance_from_itself():
    seen = jnp.array([[0.1, 0.2], [5.0, 5.0]])
    found = farthest_points(KEY, jnp.zeros(2), 1.0, seen, count=16)
    distance = np.asarray(found.distance)
    everything = np.concatenate([seen, found.points])
    for i in range(16):
        before = everything[: 2 + i]
        np.testing.assert_allclose(gap(everything[2 + i][None], before)[0], distance[i], rtol=1e-12)
    # Of a greedy choice each is at most as far as the one before, up to what candidates miss.
    assert np.all(distance[1:] <= 1.1 * distance[:-1])


def test_a_box_is_covered_as_fast_as_greedy_choice_covers_it():
    seen = jnp.zeros((256, 2))
    step = jax.jit(
        lambda key, seen, number: farthest_points(
            key, jnp.full(2, 0.5), 0.5, seen, mask=jnp.arange(256) < number, count=8
        )
    )
    number = 0
    for i in range(8):
        found = step(jax.random.fold_in(KEY, i), seen, number)
        seen = seen.at[number : number + 8].set(found.points)
        number += 8
    resolution = gap(grid((0, 0), (1, 1), 101), np.asarray(seen[:number])).max()
    # The best cover of the unit square by k disks has radius about 0.62 / sqrt(k) and more at the
    # edges; greedy choice needs at most twice that.
    assert resolution <= 2 * 0.7 / number**0.5


def test_rows_that_do_not_count_and_no_rows_at_all():
    seen = jnp.array([[0.5, 0.5], [-1.0, -1.0], [jnp.nan, jnp.inf]])
    mask = jnp.array([True, False, False])
    found = farthest_points(KEY, jnp.zeros(2), 1.0, seen, mask=mask)
    alone = farthest_points(KEY, jnp.zeros(2), 1.0, seen[:1])
    np.testing.assert_array_equal(found.points, alone.points)
    np.testing.assert_allclose(found.points, [[-1.0, -1.0]], atol=1e-12)
    nothing = farthest_points(KEY, jnp.zeros(2), 1.0, jnp.zeros((0, 2)), count=2)
    assert float(nothing.distance[0]) == np.inf
    assert float(nothing.distance[1]) > 1.0


def test_bounds_are_kept_to_the_bit_and_a_box_may_be_flat():
    lower, upper = jnp.array([0.1, -0.3, 0.7]), jnp.array([0.3, 0.9, 0.7])
    found = farthest_points(
        KEY, jnp.array([0.1, 0.9, 0.7]), 0.7, jnp.zeros((1, 3)), lower=lower, upper=upper, count=9
    )
    assert bool(jnp.all((found.points >= lower[None]) & (found.points <= upper[None])))


def test_many_dimensions_in_single_precision():
    seen = jax.random.uniform(KEY, (300, 50), jnp.float32)
    find = jax.jit(lambda key: farthest_points(key, seen[0], 0.1, seen, count=4))
    found = find(KEY)
    assert found.points.dtype == jnp.float32
    assert bool(jnp.all(jnp.abs(found.points - seen[0][None]) <= 0.1 + 1e-6))
    # Corners are sqrt(50) radii away.
    assert float(found.distance[0]) > 5
    np.testing.assert_array_equal(found.points, find(KEY).points)
    assert not np.array_equal(found.points, find(jax.random.key(1)).points)
    with pytest.raises(ValueError, match="radius is 0"):
        farthest_points(KEY, seen[0], 0.0, seen)
    with pytest.raises(ValueError, match="count is 0"):
        farthest_points(KEY, seen[0], 0.1, seen, count=0)
