"""The CBO benchmark: functions, rates, peers and comparisons do what the page says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from benchmarks import cbo, cbo_devices, cbo_peers, cbo_runs, cbo_speed
from benchmarks.cbo_functions import (
    Failing,
    Moved,
    Rotated,
    Shifted,
    ShiftedAnyhow,
    ackley,
    griewank,
    rastrigin,
    sphere,
)
from benchmarks.cbo_runs import Case, Found, success, wilson, worst
from benchmarks.frame import Measured, Settings

QUIET = Settings(quick=True, seeds=(50,), tell=lambda line: None)
FUNCTIONS = (sphere, rastrigin, ackley, griewank)


@pytest.mark.parametrize("fun", FUNCTIONS)
def test_functions_vanish_at_zero_alone_and_are_the_same_for_numpy(fun):
    key = jax.random.key(1)
    moved = Rotated(fun)(key, 4)
    assert moved.rotation @ moved.rotation.T == pytest.approx(np.eye(4), abs=1e-12)
    # Ackley's exponentials cancel to rounding times their size of 20.
    assert float(moved(moved.shift)) == pytest.approx(0, abs=1e-13)
    x = np.random.default_rng(0).uniform(-3, 3, (2, 5, 4))
    values = moved.numpy()(x)
    assert isinstance(values, np.ndarray)
    assert values.shape == (2, 5)
    assert np.min(values) > 1e-3
    assert values == pytest.approx(np.asarray(jax.vmap(jax.vmap(moved))(x)), rel=1e-12)


def test_known_values():
    # cos 2 pi z is 1 at integers, -1 halfway: z^2 + 10 - 10 cos 2 pi z by hand.
    assert float(rastrigin(jnp.array([1.0, 0.5]))) == pytest.approx((1 + 20.25) / 2)
    assert float(ackley(jnp.array([1.0, 0.0]))) == pytest.approx(
        20 * (1 - np.exp(-0.2 * np.sqrt(0.5))), rel=1e-12
    )
    assert float(griewank(jnp.array([np.pi / 20, 0.0]))) == pytest.approx(np.pi**2 / 4000 + 2)


def test_shifts():
    key = jax.random.key(0)
    assert Shifted(sphere, 2.0)(key, 3).shift.tolist() == [2.0] * 3
    drawn = jax.vmap(lambda key: ShiftedAnyhow(sphere)(key, 5).shift)(jax.random.split(key, 50))
    assert -2 <= float(drawn.min()) < -1.5
    assert 1.5 < float(drawn.max()) <= 2


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_tenth_of_the_points_fail_and_always_the_same(dtype):
    failing = Failing(sphere)
    x = jax.random.normal(jax.random.key(2), (20_000, 3), dtype)
    bad = np.isnan(jax.vmap(failing)(x))
    # The standard deviation of the share is 0.0021.
    assert np.mean(bad) == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(bad, np.isnan(jax.jit(jax.vmap(failing))(x)))
    # Neighbours fail independently: both in about a hundredth of the cases.
    near = np.isnan(jax.vmap(failing)(jnp.nextafter(x, x + 1)))
    assert np.mean(bad & near) == pytest.approx(0.01, abs=0.004)


def test_wilson_intervals():
    # Tabled for 8 of 10 at 95 %.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(100, 100)
    assert (low, high) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_keys_of_seeds_do_not_overlap_and_five_seeds_are_the_first_hundred():
    keys = jnp.concatenate([cbo_runs.keys_of(seed, 20) for seed in range(5)])
    first = jax.vmap(jax.random.key)(jnp.arange(100))
    assert jnp.array_equal(jax.random.key_data(keys), jax.random.key_data(first))


def test_a_success_is_near_in_every_coordinate_and_low():
    found = Found(error=[0.1, 0.3, 0.1], value=[0.0, 0.0, 1.0])
    assert found.successes() == [True, False, True]
    assert found.successes(below=0.5) == [True, False, False]


def test_runs_are_counted():
    case = Case("easy", Shifted(sphere, 1.0), 2, tolerax.CBO(particles=20), 100, each_quick=3)
    easy = success(case, QUIET)
    assert easy.figure == 1.0
    assert easy.detail["runs"] == 3
    assert 20 * 10 < easy.detail["evaluations"]["most"] <= 20 * 100


def test_the_worst_of_several_rates_is_reported_with_all_of_them():
    both = worst({"a": Measured([1.0], detail={"runs": 3}), "b": Measured([0.2, 0.4], value=0.3)})
    assert both.figure == 0.3
    assert list(both.samples) == [1.0, 0.3]
    assert both.detail["a"] == {"runs": 3}


def test_peers_stay_within_their_evaluations():
    fun = Moved(sphere, np.full(2, 0.5))
    counted = cbo_peers.Counted(fun, 3)
    x = np.array([[3.0, 0], [2, 0], [1, 0], [0.5, 0.5]])
    assert counted(x) == pytest.approx(fun(x))
    assert counted.x.tolist() == [1.0, 0.0]  # the fourth was beyond the budget
    assert counted.left == -1


@pytest.mark.parametrize("name", sorted(cbo_peers.PEERS))
def test_peers_find_the_minimum_of_a_sphere(name):
    fun = Moved(sphere, np.full(3, 0.5))
    x = cbo_peers.PEERS[name](fun, 3, 10_000, 0)
    assert np.max(np.abs(x - 0.5)) < 0.05


def test_a_full_benchmark_reports_its_peers():
    full = dataclasses.replace(QUIET, quick=False)
    assert cbo_peers.beside(Shifted(sphere, 1.0), 2, 1_000, QUIET) == {}
    rows = cbo_peers.beside(Shifted(sphere, 1.0), 2, 1_000, full)
    assert set(rows) == set(cbo_peers.PEERS)
    assert {row["runs"] for row in rows.values()} == {cbo_peers.EACH}


def test_speed_compares_equal_numbers_of_evaluations(monkeypatch):
    asked = []
    monkeypatch.setattr(cbo_speed, "ours", lambda *given: asked.append(given) or (lambda: 20 * 10))
    row = cbo_speed.compared(cbo_speed.Size(2, 10, 30, 20, 1.0, 1.0), QUIET)
    assert [(steps, dtype) for _, steps, dtype in asked] == [(20, jnp.float64), (20, jnp.float32)]
    assert row["steps"] == 20
    assert row["faster"]["float64"] == row["seconds"]["cbx"] / row["seconds"]["float64"]
    with pytest.raises(RuntimeError, match="short evaluated 5 points, not 20"):
        cbo_speed.least_seconds({"short": lambda: 5}, 1, 20)


def test_both_sides_of_the_speed_figure_run_the_same_scheme():
    """After one step from the same particles both have the same distribution: the mean of a new
    particle is that of drift alone and its deviation is S times the distance to the consensus."""
    size = cbo_speed.Size(1, 20_000, 1, 1, 1.0, 1.0)
    x = np.random.default_rng(0).uniform(-3, 3, (1, size.particles, 1))
    fun = Moved(rastrigin, np.ones(1))
    theirs = cbo_peers.cbx_run(fun, x, 1, s=cbo_speed.S, alpha=cbo_speed.ALPHA, seed=0).x[0, :, 0]
    solver = dataclasses.replace(cbo_speed.same_scheme(size.particles), ensemble=jnp.asarray(x[0]))
    solution = tolerax.solve(
        tolerax.Objective(Moved(rastrigin, jnp.ones(1))), solver, jnp.zeros(1), max_steps=1
    )
    mine = np.asarray(solution.state.solver_state.x)[:, 0]
    assert cbo_speed.ours(size, 1, jnp.float64)() == size.particles
    w = np.exp(-cbo_speed.ALPHA * fun(x[0]))
    m = float(w @ x[0, :, 0] / w.sum())
    u = x[0, :, 0] - m
    for new in (mine, theirs):
        xi = (new - m - (1 - cbo_speed.DT) * u) / (cbo_speed.S * u)
        # Standard errors of mean and deviation of 20,000 standard normals: 0.007 and 0.005.
        assert np.mean(xi) == pytest.approx(0, abs=0.035)
        assert np.std(xi) == pytest.approx(1, abs=0.025)


def test_device_runs_are_compared_bit_by_bit():
    x = np.linspace(1, 2, 6)
    runs = {f"{n} Kind 64": x.copy() for n in (0, 1, 2, 4, 8)}
    equal = cbo_devices.compare(runs)
    assert equal["device_bits_differ"].figure == 0
    assert equal["device_difference"].figure == 0
    runs["8 Kind 64"][3] = np.nextafter(runs["8 Kind 64"][3], 9)
    runs["1 Kind 64"][0] += 1e-6
    one = cbo_devices.compare(runs)
    assert one["device_bits_differ"].figure == 1
    assert one["device_difference"].figure == pytest.approx(5e-7, rel=1e-3)


def test_particles_on_four_devices_move_as_on_two_and_on_one():
    """The points that are exchanged for probes, 256 at most, lie on one device of two, on two of
    four, and all 512 on one of one."""
    names = cbo_devices.names([512], counts=(1, 2, 4), kinds=("SoftConsensus",))
    more = cbo_devices.names([128], counts=(2, 4), kinds=("RankWeights", "Polarized"))
    runs = cbo_devices.same_runs(cbo_devices.all_runs(names + more, steps=3))
    by, polarized = runs["SoftConsensus 512"], runs["Polarized 128"]
    assert np.array_equal(by[4], by[2])
    assert np.array_equal(polarized[4], polarized[2])
    # Products of matrices may round as the length of what a device holds has it.
    covariance = runs["RankWeights 128"]
    assert covariance[4] == pytest.approx(covariance[2], rel=1e-12)
    # One device rounds as several do, and may sum the blocks in an order of its own.
    assert by[1] == pytest.approx(by[2], rel=1e-12)


def test_every_figure_has_a_bar_and_a_group():
    names = [bar.name for group in cbo.GROUPS for bar in group.bars]
    assert len(set(names)) == len(names) == 18
