"""The score under noise: areas by hand, and what solvers are told."""

import numpy as np
import pytest

from benchmarks.dfo_robust import Case, Observed, SpentError, areas, work

CASE = Case("bowl", lambda x: float(x @ x) + 3.0, np.ones(2), np.full(2, -2.0), np.full(2, 2.0))


def test_areas_are_those_under_the_profiles():
    # Two methods, two problems, one tolerance: the ratios are 1, 4 and 2, 1.
    points = np.array([[[10.0], [40.0]], [[8.0], [4.0]]])
    # On [0, 2.2] half of the problems are solved at once; the first method has all from 1 on.
    np.testing.assert_allclose(areas(points), [0.5 * 2.2 + 0.5 * 1.2, 0.5 * 2.2 + 0.5 * 0.2])
    never = np.array([[[10.0], [np.inf]], [[8.0], [4.0]]])
    np.testing.assert_allclose(areas(never), [0.5 * 1.1 + 0.5 * 0.1, 0.5 * 1.1])
    assert np.all(areas(np.full((3, 2, 4), np.inf)) == 0)


def test_points_are_counted_until_the_value_is_there():
    lowest = [np.array([10.0, 5.0, 0.5]), np.array([10.0, 0.0])]
    points = work(lowest, first=10.0, least=0.0)
    # Within a tenth of the way: at the third point, and at the second.
    assert points[:, 0].tolist() == [3.0, 2.0]
    assert points[:, 1].tolist() == [np.inf, 2.0]


def test_what_is_told_depends_on_run_and_point_alone():
    x = np.array([0.1, 0.2])
    told = [Observed(CASE, "noisy", run)(x) for run in (0, 0, 1)]
    assert told[0] == told[1] != told[2]
    # Normal noise of 0.001 times the value: 6 deviations are no accident.
    assert 0 < abs(told[0] - CASE.value(x)) < 6e-3 * CASE.value(x)


def test_values_are_missing_and_the_truth_is_kept():
    fun = Observed(CASE, "random_nan", 0)
    fun.budget = 1000
    rows = np.random.default_rng(0).uniform(-2, 2, (1000, 2))
    told = np.array([fun(x) for x in rows])
    # 50 on average, with a deviation of 7.
    assert 20 < np.isnan(told).sum() < 80
    np.testing.assert_array_equal(fun.truth, [CASE.value(x) for x in rows])
    with pytest.raises(SpentError):
        fun(rows[0])
