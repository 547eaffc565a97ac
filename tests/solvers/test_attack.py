"""Directional attacks: what is asked, zero gradients, constraints, and the turns of the others."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import DirectionalAttack, NeuralSurrogate, Objective, Query, Status
from tolerax.inner.particles import first_differentiated
from tolerax.solvers._attack_steps import estimated, orthogonal_rows

ALONE = DirectionalAttack(then=())


def bowl(x):
    return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * (x - jnp.array([0.5, -0.25, 0.1])) ** 2)


def test_only_the_first_point_of_a_batch_is_differentiated():
    problem = Objective(bowl, constraints=lambda x: x[0] * x[1])
    points = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([True, True, False])
    query = Query(
        points,
        tolerax.Accuracy(jnp.ones(3), jnp.ones(3)),
        mask=mask,
        derivatives=1,
        first_only=True,
    )
    answer: Any = first_differentiated(problem, query)
    np.testing.assert_allclose(answer.gradient[0], jax.grad(bowl)(points[0]), rtol=1e-12)
    assert np.isnan(np.asarray(answer.gradient[1:])).all()
    np.testing.assert_allclose(answer.value[1], bowl(points[1]), rtol=1e-12)
    np.testing.assert_allclose(answer.violation[:2], [2.0, 0.0])
    np.testing.assert_allclose(answer.jacobian.rmv(jnp.array(1.0)), [2.0, 1.0, 0.0])
    assert answer.work.as_dict() == {"points": 2, "values": 2, "gradients": 1}


def test_one_gradient_serves_a_ladder_of_values():
    solution = tolerax.solve(Objective(bowl), ALONE, jnp.zeros(3), max_steps=4)
    # Two gradients, two ladders of four directions at four lengths.
    assert solution.work.as_dict() == {"points": 34, "values": 34, "gradients": 2}
    assert float(solution.value) < float(bowl(jnp.zeros(3)))


def test_attacks_alone_minimize_what_is_smooth():
    solver = DirectionalAttack(then=(), gain=1e-9)
    solution = tolerax.solve(Objective(bowl, bounds=(-1.0, 1.0)), solver, jnp.ones(3))
    assert solution.status == Status.stalled
    np.testing.assert_allclose(solution.x, [0.5, -0.25, 0.1], atol=1e-3)


def test_a_zero_gradient_is_passed_on():
    """A plateau around the start, as of a saturated network: only values help."""

    def flat(x):
        slope = jnp.sum(jnp.maximum(jnp.abs(x - 0.6) - 0.05, 0.0))
        return jnp.where(jnp.max(jnp.abs(x)) < 0.1, 2.0, slope)

    problem = Objective(flat, bounds=(-1.0, 1.0))
    alone = tolerax.solve(problem, ALONE, jnp.zeros(2), max_steps=50)
    assert alone.status == Status.stalled
    assert float(alone.value) == 2.0
    solution = tolerax.solve(problem, DirectionalAttack(), jnp.zeros(2), max_steps=400)
    assert float(solution.value) <= 1e-6


def test_constraints_are_met_where_attacks_and_models_end():
    """The point of a disc nearest to (2, 1): at (2, 1) / sqrt(5)."""
    network = lambda x: jnp.stack([x[0] ** 2 + x[1] ** 2, x[0], x[1]])  # noqa: E731
    problem = NeuralSurrogate(
        network,
        lambda z, x: (z[1] - 2) ** 2 + (z[2] - 1) ** 2,
        constraints=lambda z, x: z[0] - 1.0,
        trust=(-3.0, 3.0),
    )
    # 1e-9 of violation buys as much in the value, and 3e-5 in x along the arc.
    solver, start = DirectionalAttack(feasible_within=1e-9), jnp.array([-2.0, 2.0])
    solution = tolerax.solve(problem, solver, start, max_steps=600, max_work={"points": 2000})
    assert float(solution.violation) <= 1e-6
    # Nothing but its budget ends a run whose ends nothing agrees on.
    assert solution.status == Status.budget
    # Steps along tangents converge as Newton's do; along the arc values are flat, so that 1e-12 in
    # them is 1e-6 in x.
    np.testing.assert_allclose(solution.x, np.array([2.0, 1.0]) / np.sqrt(5), atol=1e-4)


class Below(eqx.Module):
    """x[0] <= edge; what says nothing of where that is, elsewhere."""

    edge: jax.Array

    def __call__(self, x):
        return jnp.where(x[0] < self.edge, x[0] - self.edge, 2.0)


def test_a_plateau_without_feasible_points_is_left():
    """The objective pulls away from where points are feasible, and the violation is flat; without
    any such place searches agree on that, though the penalty grows with every gradient."""
    solver = DirectionalAttack(then=(tolerax.ModelTrustRegion(),))

    away = lambda x: -jnp.sum(x)  # noqa: E731

    def found(edge):
        problem = Objective(away, bounds=(-1.0, 1.0), constraints=Below(jnp.array(edge)))
        return tolerax.solve(problem, solver, jnp.ones(2), max_steps=400)

    solution = found(0.0)
    assert float(solution.violation) == 0.0
    np.testing.assert_allclose(solution.x, [0.0, 1.0], atol=1e-3)
    solution = found(-2.0)
    assert solution.status == Status.infeasible
    assert float(solution.violation) == 2.0


def test_without_derivatives_gradients_are_estimated():
    problem = Objective(lambda x: float(bowl(x)), host=True)
    solution = tolerax.solve(
        problem, DirectionalAttack(then=(), samples=3), jnp.zeros(3), max_work={"points": 400}
    )
    assert float(solution.value) < 1e-2 * float(bowl(jnp.zeros(3)))
    assert int(solution.work.gradients) == 0
    with pytest.raises(TypeError, match="needs gradients"):
        tolerax.solve(problem, DirectionalAttack(then=()), jnp.zeros(3))


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_an_estimate_is_the_gradient_where_there_are_enough_directions(samples):
    """Of a quadratic, whose central differences are exact; also where they are no whole number of
    bases, and at a bound, where steps are cut off."""
    slope, x = jnp.array([-0.5, 2.5]), jnp.array([0.25, 1.0])
    fun = lambda x: slope @ x + x @ jnp.array([[1.0, 0.3], [0.3, 2.0]]) @ x / 2  # noqa: E731
    steps = 0.1 * orthogonal_rows(jax.random.key(samples), samples, x)
    np.testing.assert_allclose(jnp.linalg.norm(steps, axis=1), 0.1, rtol=1e-12)
    rungs = jnp.concatenate([x[None] + steps, x[None] - steps])
    found = estimated(rungs, jax.vmap(fun)(rungs))
    np.testing.assert_allclose(found, jax.grad(fun)(x), rtol=1e-10)
    cut = jnp.minimum(rungs, 1.0)
    linear = lambda x: slope @ x  # noqa: E731
    np.testing.assert_allclose(estimated(cut, jax.vmap(linear)(cut)), slope, rtol=1e-10)


def test_the_solvers_of_turns_have_the_radius_of_the_attack():
    solvers: Any = DirectionalAttack(radius=0.25)._others()
    assert [solver.radius for solver in solvers] == [0.25, 0.25]


class Hard(eqx.Module):
    """Four functions in one, for one compilation: many minima; plateaus; a region without values
    across the way; and one that is convex. The lowest value is 0."""

    kind: jax.Array

    def __call__(self, x):
        bumps = jnp.sum(x**2 + 10 * (1 - jnp.cos(2 * jnp.pi * x))) / 10
        plateaus = 0.1 * jnp.sum(jnp.floor(0.5 + 4 * jnp.abs(x - 0.3)))
        smooth = jnp.sum((x - 0.3) ** 2) + (x[0] - 0.3) ** 4
        failing = jnp.where(jnp.abs(jnp.sum(x) - 2) < 0.5, jnp.nan, smooth)
        return jnp.stack([bumps, plateaus, failing, smooth])[self.kind]


def ended(solver, kind, key, points):
    return tolerax.solve(
        Objective(Hard(jnp.array(kind)), bounds=(jnp.full(2, -4.0), jnp.full(2, 4.0))),
        solver,
        jnp.array([2.9, -3.1]),
        key=jax.random.key(key),
        max_steps=2000,
        max_work={"points": points},
    )


@pytest.mark.parametrize("kind", range(3))
def test_no_pure_method_ends_lower(kind):
    """In the median of five keys, with the same budget."""
    middle = lambda solver: np.median(  # noqa: E731
        [float(ended(solver, kind, key, 1500).value) for key in range(5)]
    )
    ours = middle(DirectionalAttack())
    pure = (ALONE, tolerax.CDSM(), tolerax.ModelTrustRegion(explore=True, batch=16))
    assert ours <= min(middle(solver) for solver in pure) + 1e-6


def test_where_searches_end_at_different_heights_the_budget_is_spent():
    solution = ended(DirectionalAttack(), 0, 0, 1500)
    assert solution.status == Status.budget
    assert int(solution.work.points) == 1500
    # No attack and no solver was left out.
    assert float(jnp.min(solution.state.solver_state.turns.left)) < jnp.inf


def test_within_bounds_a_minimum_is_believed_after_six_more_attacks():
    solution = ended(DirectionalAttack(), 3, 0, 4000)
    assert solution.status == Status.converged_estimated
    assert int(solution.state.solver_state.turns.alike) == 6
    np.testing.assert_allclose(solution.x, [0.3, 0.3], atol=1e-5)


def test_bad_options_are_named():
    for options, match in [
        ({"gain": 0.0}, "gain is 0.0"),
        ({"samples": -1}, "samples is -1"),
        ({"samples": True}, "samples is True: give an integer of at least 0"),
        ({"memory": 0}, "memory is 0"),
        ({"burst": 0.0}, "burst is 0.0"),
    ]:
        with pytest.raises(ValueError, match=match):
            DirectionalAttack(**options)
    with pytest.raises(ValueError, match="must ask for values at batches"):
        tolerax.solve(
            Objective(bowl), DirectionalAttack(then=(tolerax.InexactLineSearch(),)), jnp.zeros(3)
        )
