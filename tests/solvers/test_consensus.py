"""The parts of consensus-based optimization against what they are defined as."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tolerax
from tolerax import CBO, Objective, Status
from tolerax.inner.particles import blocks_of, total, weighted_mean
from tolerax.solvers import (
    Anisotropic,
    Ball,
    ConsensusHopping,
    ConsensusSampling,
    Covariance,
    EffectiveSampleSize,
    EnsembleKalmanInversion,
    HardMinimum,
    Isotropic,
    Polarized,
    Quantile,
    RankWeights,
    Simplex,
    SoftConsensus,
    Sphere,
    Stiefel,
)
from tolerax.solvers._population import check_count
from tolerax.validation import check_options

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(50, 3)))
E = jnp.asarray(RNG.exponential(size=50))
NONE = jnp.zeros(50)
STEP = jnp.array(0)


def agree(consensus, x=X, energy=E, violation=NONE):
    return consensus(x, energy, violation, STEP, None)


def test_soft_consensus_is_the_boltzmann_mean():
    w = np.exp(-7.0 * (E - E.min()))
    found = agree(SoftConsensus(7.0, standardized=False))
    np.testing.assert_allclose(found.point[0], w @ X / w.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.effective, w.sum() ** 2 / (w**2).sum(), rtol=1e-12)
    # In other units, and shifted, the standardized one is the same.
    one = agree(SoftConsensus(7.0))
    other = agree(SoftConsensus(7.0), energy=1e6 * E - 3e3)
    np.testing.assert_allclose(one.point, other.point, rtol=1e-6)


@pytest.mark.parametrize(
    "consensus",
    [HardMinimum(), SoftConsensus(30.0), EffectiveSampleSize(0.3), RankWeights(), Quantile(0.2)],
    ids=lambda c: type(c).__name__,
)
def test_failed_particles_have_no_weight_and_order_does_not_matter(consensus):
    failed = jnp.arange(50) % 3 == 0
    there = agree(consensus, energy=jnp.where(failed, jnp.inf, E), violation=E)
    kept = ~np.asarray(failed)
    without = consensus(X[kept], E[kept], E[kept], STEP, None)
    np.testing.assert_allclose(there.point, without.point, rtol=1e-6)
    order = RNG.permutation(50)
    again = agree(consensus, X[order], jnp.where(failed, jnp.inf, E)[order], violation=E[order])
    np.testing.assert_allclose(there.point, again.point, rtol=1e-6)


def test_no_energy_overflows_in_float32():
    energy = jnp.array([1e30, 3e38, 2e38, jnp.inf], jnp.float32)
    x = jnp.arange(8, dtype=jnp.float32).reshape(4, 2)
    for consensus in (SoftConsensus(1e30), SoftConsensus(1e30, standardized=False)):
        point = consensus(x, energy, jnp.zeros(4), STEP, None).point
        np.testing.assert_array_equal(point, x[:1])


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_effective_sample_size_is_the_share_asked_for(share):
    assert float(agree(EffectiveSampleSize(share)).effective) == pytest.approx(50 * share, rel=1e-3)


def test_a_polarized_consensus_keeps_two_clusters_apart():
    x = jnp.concatenate([X * 0.1, X * 0.1 + 10])
    point = agree(Polarized(1.0), x, jnp.concatenate([E, E]), jnp.zeros(100)).point
    assert float(jnp.max(jnp.abs(point[:50]))) < 1
    assert float(jnp.min(point[50:])) > 9


def test_the_quantile_looks_at_the_lowest_violations_only():
    lower = jnp.arange(50.0)
    found = agree(Quantile(0.1, alpha=1e6), violation=lower)
    np.testing.assert_allclose(found.point[0], X[int(np.argmin(E[:5]))], rtol=1e-6)


@pytest.mark.parametrize(("lowest", "radius"), [(0.0, 1.0), (-9.0, 2.0)])
def test_an_objective_over_the_minimizers_of_another(lowest, radius):
    """The minimizers are a circle; where the lower level is below 0, a disk."""
    end = jnp.array([3.0, 0.0])
    upper = lambda x: jnp.sum((x - end) ** 2)  # noqa: E731
    lower = lambda x: (x @ x - 1) ** 2 + lowest  # noqa: E731
    solver = CBO(consensus=Quantile())
    solution = tolerax.solve(Objective(upper, constraints=lower), solver, jnp.zeros(2))
    assert bool(solution.success)
    np.testing.assert_allclose(solution.x, [radius, 0.0], atol=3e-2)


def test_the_contraction_of_anisotropic_noise_is_the_integral():
    """E log|1 - h + s xi|, by quadrature around its singularity; it changes sign near 1.57."""

    def exact(s, h):
        zero = -(1 - h) / s
        f = lambda t: np.log(abs(1 - h + s * t)) * scipy.stats.norm.pdf(t)  # noqa: E731
        return sum(scipy.integrate.quad(f, *ends)[0] for ends in ((-12, zero), (zero, 12)))

    for s in (0.5, 1.0, 1.5, 1.6):
        # Midpoints of 20,000 quantiles: the singular cell counts for about log(20,000) / 20,000.
        assert Anisotropic(s).contraction(0.01, 5) == pytest.approx(exact(s, 0.01), abs=2e-3)
    assert Anisotropic(1.5).contraction(0.01, 5) < 0 < Anisotropic(1.65).contraction(0.01, 5)


def test_noise_that_beats_the_drift_is_named():
    problem = Objective(lambda x: jnp.sum(x**2))
    with pytest.warns(UserWarning, match="will not agree"):
        tolerax.solve(problem, CBO(noise=Anisotropic(2.0)), jnp.ones(2), max_steps=2)
    with pytest.warns(UserWarning, match="Isotropic"):
        tolerax.solve(problem, CBO(noise=Isotropic(1.0)), jnp.ones(20), max_steps=2)


def test_one_step_has_the_moments_of_the_equation():
    """Mean (1 - lambda dt) u and variance s^2 u_j^2 in every coordinate."""
    n, s, h = 200_000, 0.7, 0.1
    u = jnp.broadcast_to(jnp.array([[2.0, -1.0, 0.5]]), (n, 3))
    key, scale, w = jax.random.key(0), jnp.ones(3), jnp.full(n, 1 / n)
    moved = Anisotropic(s, jumps=None)(key, u, (1 - h) * u, scale, w, None)
    error = s * np.abs(u[0]) / np.sqrt(n)
    assert np.all(np.abs(np.mean(moved, axis=0) - (1 - h) * u[0]) < 5 * error)
    np.testing.assert_allclose(np.std(moved, axis=0), s * np.abs(u[0]), rtol=5 / np.sqrt(2 * n))
    moved = Isotropic(s)(key, u, (1 - h) * u, scale, w, None)
    length = float(jnp.linalg.norm(u[0]))
    np.testing.assert_allclose(np.std(moved, axis=0), s * length, rtol=5 / np.sqrt(2 * n))
    # Jumps: that share of the particles has one coordinate of the size of the start.
    jumped = Anisotropic(0.0, jumps=0.02, jump_scale=3.0)(key, u, u, scale, w, None) != u
    assert np.max(np.sum(jumped, axis=1)) == 1
    assert np.mean(np.any(jumped, axis=1)) == pytest.approx(0.02, abs=5 * np.sqrt(0.02 / n))


def test_covariance_noise_learns_a_rotated_valley():
    """On a quadratic of condition 1e6, rotated, it reaches what rounding leaves."""
    d = 6
    Q = np.linalg.qr(RNG.normal(size=(d, d)))[0]
    H = jnp.asarray(Q * np.logspace(0, 6, d) @ Q.T)
    solver = CBO(particles=200, consensus=RankWeights(), noise=Covariance(), tol=1e-6)
    problem = Objective(lambda x: 0.5 * (x - 1) @ H @ (x - 1))
    solution = tolerax.solve(problem, solver, jnp.zeros(d), max_steps=400)
    assert float(solution.value) < 1e-8
    with pytest.raises(ValueError, match="Polarized"):
        tolerax.solve(
            problem, CBO(noise=Covariance(), consensus=Polarized()), jnp.zeros(d), max_steps=2
        )


def test_values_of_a_bilevel_problem_are_asked_for_accurately():
    """upper |y - t|^2 / 2 over y = b / (1 + e^x): the optimum is where 1 + e^x = |b|^2 / t'b."""
    b, t = jnp.array([2.0, 1.0]), jnp.array([1.0, 0.3])
    ridge = tolerax.Bilevel(
        lambda y, x: 0.5 * jnp.sum((y - t) ** 2),
        lambda y, x: 0.5 * jnp.sum((y - b) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(y**2),
        jnp.zeros(2),
        strong_convexity=lambda x: 1 + jnp.exp(x),
        self_concordance=0.0,
        upper_smoothness=1.0,
    )
    solver = CBO(particles=20, accuracy=tolerax.Accuracy(1e-5, 1e-5))
    solution = tolerax.solve(ridge, solver, jnp.array(1.0), max_steps=400)
    assert bool(solution.success)
    best = float(jnp.log(b @ b / (t @ b) - 1))
    np.testing.assert_allclose(solution.x, best, atol=1e-3)
    assert float(solution.value_error) < 1e-8


def test_points_stay_on_a_sphere_and_find_the_smallest_eigenvalue():
    A = RNG.normal(size=(5, 5))
    A = jnp.asarray(A + A.T)
    problem = Objective(lambda x: x @ A @ x)
    radii = []
    solution = tolerax.solve(
        problem,
        CBO(retract=Sphere(2.0)),
        jnp.ones(5),
        max_steps=600,
        callback=lambda step: radii.append(np.linalg.norm(step.query.x, axis=1)),
    )
    np.testing.assert_allclose(np.concatenate(radii), 2.0, rtol=1e-12)
    np.testing.assert_allclose(solution.value, 4 * np.linalg.eigvalsh(A)[0], rtol=1e-3)
    q = Stiefel()(X)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"particles": 1}, "particles is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 1}, "batch is 1"),
        ({"batch": 101}, "batch is 101"),
        ({"dt": 0.0}, "dt is 0.0"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"patience": -1}, "patience is -1"),
        ({"feasible_within": -1.0}, "feasible_within is -1.0"),
        ({"ensemble": jnp.full((100, 2), jnp.nan)}, "ensemble has entries that are not finite"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CBO(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftConsensus(-1.0), "alpha is -1"),
        (lambda: EffectiveSampleSize(1.5), "share is 1.5"),
        (lambda: EffectiveSampleSize(bisections=0), "bisections is 0"),
        (lambda: Polarized(kappa=0.0), "kappa is 0"),
        (lambda: Polarized(alpha=-1.0), "alpha is -1"),
        (lambda: Quantile(share=2.0), "share is 2"),
        (lambda: Quantile(alpha=-1.0), "alpha is -1"),
        (lambda: Anisotropic(jumps=-1.0), "jumps is -1"),
        (lambda: Isotropic(-1.0), "s is -1"),
        (lambda: Isotropic(0.1, floor=-1.0), "floor is -1"),
        (lambda: Covariance(rate=5.0), "rate is 5"),
        (lambda: Simplex(-1.0), "total is -1"),
        (lambda: Ball(0.0), "radius is 0"),
        (lambda: Sphere(-1.0), "radius is -1"),
        (lambda: CBO(noise=Covariance(), gradient=1.0), "gradient is a drift"),
        (lambda: CBO(noise=Covariance(), memory=1.0), "memory is a drift"),
        (lambda: ConsensusHopping(consensus=Quantile()), "does not look at violations"),
    ],
)
def test_bad_parts_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_are_looked_at_and_integers_of_numpy_are_integers():
    given = types.SimpleNamespace(alpha=jnp.array(-1.0), particles=np.int64(50))
    check_count(given, "particles")
    with pytest.raises(ValueError, match="alpha is -1"):
        check_options(given, positive="alpha")
    jax.vmap(lambda alpha: check_options(types.SimpleNamespace(alpha=alpha), positive="alpha"))(-X)


def test_an_ensemble_that_does_not_fit_is_named():
    problem = Objective(lambda x: jnp.sum(x**2), bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match=r"shapes \[\(100, 2\)\]"):
        tolerax.solve(problem, CBO(ensemble=jnp.zeros((99, 2))), jnp.zeros(2))
    with pytest.raises(Exception, match="outside the bounds"):
        tolerax.solve(problem, CBO(ensemble=jnp.full((100, 2), 3.0)), jnp.zeros(2))


def test_block_sums_are_sums():
    over = on_one_device()
    np.testing.assert_allclose(total(lambda x: x, X, over=over), np.sum(X, axis=0), rtol=1e-12)
    np.testing.assert_allclose(weighted_mean(E, X, over), E @ X / E.sum(), rtol=1e-12)
    assert [blocks_of(n) for n in (64, 100, 7, 1000)] == [64, 4, 1, 8]


def on_one_device():
    mesh = jax.make_mesh((1,), ("particles",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("particles"))


def test_particles_that_are_spread_move_as_others():
    """The blocks are those of any number of devices, so one shows what they compute."""
    problem = Objective(lambda x: jnp.where(x[0] > 0.5, jnp.nan, jnp.sum((x - 0.2) ** 2)))
    fields = {"particles": 64, "consensus": SoftConsensus()}
    runs = [
        tolerax.solve(problem, CBO(**fields, sharding=over), jnp.zeros(3), max_steps=5)
        for over in (None, on_one_device())
    ]
    one, other = (run.state.solver_state.x for run in runs)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert int(runs[0].work.points) == int(runs[1].work.points) == 5 * 64
    assert int(runs[0].state.failures) == int(runs[1].state.failures) > 0


def test_python_code_is_evaluated_wherever_particles_lie():
    seen = []
    python = Objective(lambda x: seen.append(0) or float(np.sum(x**2)), host=True)
    solver = CBO(particles=64, sharding=on_one_device())
    solution = tolerax.solve(python, solver, jnp.ones(3), max_steps=2)
    assert len(seen) == int(solution.work.points) == 2 * 64
    assert float(solution.value) < 3


def test_particles_that_cannot_be_spread_evenly_are_named():
    class Three(NamedSharding):
        num_devices = 3

    over = on_one_device()
    with pytest.raises(ValueError, match="particles is 100, but sharding has 3 devices"):
        CBO(sharding=Three(over.mesh, over.spec))


@pytest.mark.parametrize(("mirror", "norm"), [(Simplex(2.0), 1), (Ball(3.0), 2)])
def test_mirror_maps_have_inverses_and_stay_inside(mirror, norm):
    y = 30 * RNG.normal(size=(50, 6))
    x = jax.vmap(mirror)(y)
    size = np.linalg.norm(x, ord=norm, axis=1)
    assert np.all(x >= 0 if norm == 1 else size <= 3)
    assert np.all(size <= mirror_size(mirror) + 1e-14)
    inside = jax.vmap(mirror)(0.1 * y)
    again = jax.vmap(mirror)(jax.vmap(mirror.inverse)(inside))
    np.testing.assert_allclose(again, inside, rtol=1e-10)
    assert np.all(np.isfinite(jax.vmap(mirror.inverse)(x)))


def mirror_size(mirror):
    return mirror.total if isinstance(mirror, Simplex) else mirror.radius


def test_a_mirror_map_reaches_a_corner_and_never_leaves_the_simplex():
    # On the simplex -sum a x^2 has a local minimum at every corner; the lowest has the largest a.
    a = jnp.array([1.0, 1.3, 0.7, 1.2])
    points = []
    solution = tolerax.solve(
        Objective(lambda x: -jnp.sum(a * x**2)),
        CBO(particles=50, mirror=Simplex()),
        jnp.full(4, 0.25),
        max_steps=300,
        callback=lambda step: points.append(step.query.x),
    )
    x = np.concatenate(points)
    assert np.all(x >= 0)
    np.testing.assert_allclose(x.sum(axis=1), 1, rtol=1e-12)
    assert solution.success
    np.testing.assert_allclose(solution.x, [0, 1, 0, 0], atol=1e-3)


def test_a_drift_to_constraints_holds_them_and_finds_the_minimum_on_them():
    # Rastrigin's function about v on the unit sphere, with the half-space v'x >= 0.9 (which holds
    # at the minimum), has its minimum 0 at v.
    v = jnp.array([0.48, 0.6, 0.64])
    fun = lambda x: jnp.sum((x - v) ** 2 + 0.2 * (1 - jnp.cos(12 * (x - v))))  # noqa: E731
    problem = Objective(
        fun,
        constraints=lambda x: {"norm": jnp.sum(x**2), "half": v @ x},
        constraint_bounds=({"norm": 1.0, "half": 0.9}, {"norm": 1.0, "half": jnp.inf}),
    )
    solver = CBO(particles=50, constraint_drift=100.0)
    solution = tolerax.solve(problem, solver, jnp.array([1.0, 0.0, 0.0]), max_steps=400)
    assert float(solution.violation) <= solver.feasibility
    np.testing.assert_allclose(solution.x, v, atol=2e-2)


def test_a_penalty_that_grows_with_measure_finds_the_minimum_on_a_circle():
    circle = Objective(jnp.sum, constraints=lambda x: x @ x, constraint_bounds=(1.0, 1.0))
    keys = jax.random.split(jax.random.key(0), 8)
    run = lambda key: tolerax.solve(circle, CBO(), jnp.full(2, 0.5), key=key)  # noqa: E731
    solutions = jax.jit(jax.vmap(run))(keys)
    assert bool(jnp.all(solutions.success))
    np.testing.assert_allclose(solutions.value, -(2**0.5), atol=5e-3)


def test_an_empty_feasible_set_is_named():
    nowhere = Objective(
        lambda x: jnp.sum((x - 1) ** 2), constraints=lambda x: jnp.stack([1 - x[0], x[0] + 1])
    )
    # From here a penalty that grew in every step would be infinite after 130 steps.
    solver = CBO(particles=50, penalty=1e15)
    solution = tolerax.solve(nowhere, solver, jnp.ones(2, jnp.float32))
    assert solution.status == Status.infeasible
    assert bool(jnp.all(jnp.isfinite(solution.state.solver_state.x)))
    assert bool(jnp.isfinite(solution.state.solver_state.penalty))


def test_one_step_along_a_linear_constraint_is_free_and_one_away_from_it_is_not():
    """Without noise all particles go towards the best one; `a'x = 1` holds for it alone."""
    a = jnp.array([3.0, 4.0]) / 5
    x = jnp.array([[0.6, 0.8], [0.6, -0.2], [-0.2, 1.4]])
    problem = Objective(
        lambda x: jnp.sum((x - a) ** 2),
        constraints=lambda x: a @ x,
        constraint_bounds=(1.0, 1.0),
    )
    fields = {"particles": 3, "noise": Anisotropic(0.0, jumps=0.0), "ensemble": x, "dt": 0.1}
    ends = [
        tolerax.solve(problem, CBO(**fields, **more), a, max_steps=1).state.solver_state.x
        for more in ({}, {"constraint_drift": 1e8})
    ]
    np.testing.assert_allclose(ends[0], x + 0.1 * (a[None] - x), rtol=1e-12)
    # The second particle is put on the line, the third moves along it by as much as without.
    np.testing.assert_allclose(ends[1] @ a, 1.0, rtol=1e-6)
    across = jnp.array([-4.0, 3.0]) / 5
    np.testing.assert_allclose(ends[1] @ across, ends[0] @ across, rtol=1e-6, atol=1e-12)


def test_a_drift_to_constraints_in_single_precision():
    problem = Objective(
        lambda x: jnp.sum(x),
        constraints=lambda x: jnp.stack([x @ x, x[0]]),
        constraint_bounds=(jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])),
    )
    start = jnp.array([1.0, 0.0], jnp.float32)
    solver = CBO(particles=20, constraint_drift=100.0, feasible_within=1e-5)
    solution = tolerax.solve(problem, solver, start, max_steps=200)
    assert solution.x.dtype == jnp.float32
    # The penalty of 1 is less than |grad f|: a violation of 1e-5 lowers the value by that much.
    np.testing.assert_allclose(solution.x, [-(0.5**0.5)] * 2, atol=3e-2)


def test_sets_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="take one of mirror and retract"):
        CBO(mirror=Simplex(), retract=Sphere())
    with pytest.raises(ValueError, match="noise that is added"):
        CBO(mirror=Simplex(), noise=Covariance())
    bounded = Objective(lambda x: jnp.sum(x), bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match="mirror is given and the problem has bounds"):
        tolerax.solve(bounded, CBO(mirror=Simplex()), jnp.full(2, 0.5))
    for solver in (CBO(retract=Sphere()), ConsensusHopping(retract=Sphere())):
        with pytest.raises(ValueError, match="retract is given and the problem has bounds"):
            tolerax.solve(bounded, solver, jnp.full(2, 0.5))
    with pytest.raises(ValueError, match="points of this problem have no `violation`"):
        tolerax.solve(Objective(lambda x: jnp.sum(x)), CBO(consensus=Quantile()), jnp.zeros(2))
    with pytest.raises(ValueError, match="constraint_drift is given, but the problem has no"):
        tolerax.solve(Objective(lambda x: jnp.sum(x)), CBO(constraint_drift=1.0), jnp.zeros(2))
    with pytest.raises(ValueError, match="memory is -1"):
        CBO(memory=-1.0)


def test_particles_that_all_start_on_one_point_find_the_minimum():
    problem = Objective(lambda x: jnp.sum((x - 1) ** 2))
    solver = CBO(particles=20, ensemble=jnp.full((20, 2), 3.0))
    solution = tolerax.solve(problem, solver, jnp.full(2, 3.0))
    assert bool(solution.success)
    assert float(solution.value) < 1e-4


def test_two_particles_that_agree_elsewhere_claim_nothing():
    """Two probes alone may find nothing lower, and the best particle agrees with itself."""
    problem = tolerax.LeastSquares(lambda x: x - 1)
    kalman, sampling = EnsembleKalmanInversion, ConsensusSampling
    for solver in (CBO(particles=2), kalman(particles=2), sampling(particles=2, mode="optimize")):
        solution = tolerax.solve(problem, solver, jnp.full(10, 3.0), max_steps=200)
        assert not bool(solution.success)
        assert float(solution.value) > 1e-4


def test_a_batch_that_fails_whole_is_not_the_end():
    """Three in ten points fail, so one batch of two in eleven does."""
    holes = Objective(
        lambda x: jnp.where(jnp.abs(jnp.sum(x) * 1e5) % 1 < 0.3, jnp.nan, jnp.sum((x - 1) ** 2))
    )
    solver = CBO(particles=20, batch=2)
    solution = tolerax.solve(holes, solver, jnp.full(2, 3.0), max_steps=300)
    assert solution.status == Status.budget
    assert int(solution.work.points) == 2 * 300
    assert float(solution.value) < 4  # 8 at the start
    nowhere = Objective(lambda x: jnp.sum(x) * jnp.nan)
    solution = tolerax.solve(nowhere, solver, jnp.full(2, 3.0))
    assert solution.status == Status.all_failed
    assert int(solution.work.points) == 20


def test_probes_that_rounding_undoes_are_no_success():
    problem = Objective(lambda x: jnp.sum((x - 1) ** 2))
    far = jnp.full(2, 1e9, jnp.float32)
    solution = tolerax.solve(problem, ConsensusHopping(particles=50), far, max_steps=60)
    assert solution.status == Status.stalled
    assert "solve_with_restarts" in solution.message
