"""The score under noise: what solvers do with the functions that OptiProfiler gives them."""

import numpy as np
import pytest

from benchmarks.dfo_robust import METHODS, POINTS, scores

LOW, HIGH = np.array([-2.0, 0.5, -2.0]), np.array([2.0, 0.5, np.inf])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_keep_bounds_and_points_and_do_not_mind_what_is_missing(method):
    random, points = np.random.default_rng(0), []

    def bowl(x):
        points.append(x.copy())
        value = float(np.sum((x - 1.0) ** 2)) + 1e-3 * random.standard_normal()
        return np.nan if len(points) > 1 and random.uniform() < 0.05 else value

    start = np.array([0.0, 0.5, 0.0])
    x = method(bowl, start, LOW, HIGH)
    assert 20 < len(points) <= POINTS * 3
    assert np.all((np.array(points) >= LOW) & (np.array(points) <= HIGH))
    # Where the bowl rises by thirty times the noise.
    np.testing.assert_allclose(x, [1.0, 0.5, 1.0], atol=0.2)


def test_scores_are_means_of_areas_in_units_of_the_best_one():
    found, profiles = scores("random_nan", ["ROSENBR", "BEALE"], 0)
    assert profiles.shape == (len(METHODS), 10)
    np.testing.assert_allclose(profiles.max(0), 1.0)
    assert np.all(profiles >= 0)
    np.testing.assert_allclose(found, profiles.mean(1))
