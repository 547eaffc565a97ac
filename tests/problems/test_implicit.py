"""The oracle as a whole: batches, pytrees, warm starts, Hessian products, derivatives, work."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.problems.truth import (
    MAKE,
    ask,
    errors,
    evaluate,
    exact,
    outcome,
    small_penalties,
    some_x,
)
from tolerax.contracts import Accuracy, Query
from tolerax.problems import BackwardReport
from tolerax.problems.implicit import Implicit


@pytest.fixture(scope="module")
def penalties():
    return small_penalties()


def test_a_batch_equals_its_members_and_counts_only_what_was_asked(penalties):
    d, rng = exact("penalties"), np.random.default_rng(0)
    x = np.stack([some_x("penalties", rng) for _ in range(3)])
    trees = jnp.asarray(x).reshape(3, 5, 3)
    accuracy = Accuracy(jnp.array([1e-2, 1e-4, 1e-3]), jnp.full(3, 1e-3))
    mask = jnp.array([True, True, False])
    batch = evaluate(penalties.problem, Query(trees, accuracy, None, mask))
    units = 0
    for i in range(3):
        single = ask(penalties.problem, trees[i], accuracy.state[i], 1e-3)
        for name in ("value", "value_error", "gradient", "gradient_error"):
            # Batched sums are rounded otherwise: within what the bounds leave open.
            scale = float(single.value_error if name.startswith("value") else single.gradient_error)
            np.testing.assert_allclose(
                getattr(batch, name)[i], getattr(single, name), rtol=1e-3, atol=1e-3 * scale
            )
        assert (
            outcome(jax.tree.map(lambda s, i=i: s[i], batch.status))
            == outcome(single.status)
            == "ok"
        )
        truth = d.at(x[i])
        value, _ = errors(single, truth)
        assert value <= single.value_error
        assert abs(float(batch.value[i]) - truth.value) <= batch.value_error[i]
        units += int(single.work.units) * int(mask[i])
    assert abs(int(batch.work.units) - units) <= 4
    assert batch.work.points == 2
    assert batch.carry.y.shape == (3, 15)
    again = evaluate(penalties.problem, Query(trees, accuracy, batch.carry, mask))
    assert again.work.units < batch.work.units


def test_a_vmapped_oracle_is_the_batch(penalties):
    x = jnp.stack([jnp.full((5, 3), -3.0), jnp.full((5, 3), -5.0)])
    one = lambda x: penalties.problem.evaluate(Query(x, Accuracy(1e-3, 1e-3)))  # noqa: E731
    lanes = jax.jit(jax.vmap(one))(x)
    for i in range(2):
        single = ask(penalties.problem, x[i], 1e-3, 1e-3)
        assert abs(float(lanes.value[i] - single.value)) <= lanes.value_error[i]


def test_pytrees_of_x_and_y_change_nothing():
    """The same problem with y in two leaves of different shapes and x in a dict."""
    rng = np.random.default_rng(1)
    A = rng.normal(size=(12, 5))
    A, b = jnp.asarray(A), jnp.asarray(rng.normal(size=12))

    def lower(y, x):
        return 0.5 * jnp.sum((A @ y - b) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    flat = tolerax.Bilevel(
        lambda y, x: jnp.sum((y - 1) ** 2),
        lower,
        jnp.zeros(5),
        strong_convexity=lambda x: jnp.exp(x),
        self_concordance=0.0,
        upper_smoothness=2.0,
    )
    join_y = lambda y: jnp.concatenate([y["a"].ravel(), y["b"][None]])  # noqa: E731
    join_x = lambda x: jnp.concatenate([x[0], x[1]["c"].ravel()])  # noqa: E731
    split_y = lambda v: {"a": v[:4].reshape(2, 2), "b": v[4]}  # noqa: E731
    tree = tolerax.Bilevel(
        lambda y, x: jnp.sum((join_y(y) - 1) ** 2),
        lambda y, x: lower(join_y(y), join_x(x)),
        split_y(jnp.zeros(5)),
        strong_convexity=lambda x: split_y(jnp.exp(join_x(x))),
        self_concordance=0.0,
        upper_smoothness=2.0,
    )
    x = jnp.linspace(-2.0, 1.0, 5)
    in_tree = (x[:2], {"c": x[2:].reshape(3, 1)})
    one = ask(flat, x, 1e-6, 1e-6, derivatives=2)
    other = ask(tree, in_tree, 1e-6, 1e-6, derivatives=2)
    assert jax.tree.structure(other.gradient) == jax.tree.structure(in_tree)
    np.testing.assert_allclose(other.value, one.value, rtol=1e-9)
    np.testing.assert_allclose(join_x(other.gradient), one.gradient, rtol=1e-6)
    np.testing.assert_allclose(other.gradient_error, one.gradient_error, rtol=1e-3)
    v = jnp.arange(5.0)
    product = other.hessian.mv((v[:2], {"c": v[2:].reshape(3, 1)}))
    np.testing.assert_allclose(join_x(product), one.hessian.mv(v), rtol=1e-4, atol=1e-7)
    y, report = tree.oracle.solve_state(in_tree, 1e-6)
    assert outcome(report.status) == "ok"
    assert y["a"].shape == (2, 2)


@pytest.mark.parametrize("name", ["quadratic", "penalties", "variation", "cleaning"])
def test_hessian_products_against_the_differentiated_truth(name):
    """phi'' by differentiating phi' = J_x - F_x'q through a dense solution map: with
    y' = -H^-1 F_x and everything evaluated at the solution."""
    rng = np.random.default_rng(2)
    d = exact(name)
    x = jnp.asarray(some_x(name, rng))
    truth = d.at(np.asarray(x))

    def gradient(x):
        # One exact Newton step from the solution makes y depend on x as it does to first order.
        step = jnp.linalg.solve(
            jax.lax.stop_gradient(d.hessian(truth.y, x)), d.gradient(truth.y, x)
        )
        y = truth.y - step
        q = jnp.linalg.solve(d.hessian(y, x), d.upper_gradient(y, x))
        return d.total(y, q, x)

    dense = np.asarray(jax.jacfwd(gradient)(x))
    problem = MAKE[name]().problem
    answer = ask(problem, d.x_of(x), 1e-8, 1e-10, derivatives=2)
    product = eqx.filter_jit(lambda hessian, v: hessian.mv(v))
    scale = np.linalg.norm(dense, 2)
    for _ in range(3):
        v = rng.normal(size=x.shape)
        found = jax.flatten_util.ravel_pytree(product(answer.hessian, d.x_of(jnp.asarray(v))))[0]
        np.testing.assert_allclose(found, dense @ v, atol=1e-5 * scale * np.linalg.norm(v))
    # Two solves a product, linear in the vector, symmetric up to their tolerance.
    u = rng.normal(size=x.shape)
    hv = jax.flatten_util.ravel_pytree(product(answer.hessian, d.x_of(jnp.asarray(v))))[0]
    hu = jax.flatten_util.ravel_pytree(product(answer.hessian, d.x_of(jnp.asarray(u))))[0]
    np.testing.assert_allclose(u @ hv, v @ hu, atol=1e-5 * scale * np.linalg.norm(v))


def test_warm_starts_save_work_and_failed_points_do_not_spoil_them(penalties):
    x = penalties.x0
    cold = ask(penalties.problem, x, 1e-4, 1e-4)
    warm = ask(penalties.problem, x + 0.01, 1e-4, 1e-4, cold.carry)
    fresh = ask(penalties.problem, x + 0.01, 1e-4, 1e-4)
    assert warm.work.units < 0.7 * fresh.work.units
    failed = ask(penalties.problem, jnp.full_like(x, jnp.nan), 1e-4, 1e-4, cold.carry)
    assert outcome(failed.status) == "failed"
    for kept, before in zip(
        jax.tree.leaves(failed.carry), jax.tree.leaves(cold.carry), strict=True
    ):
        np.testing.assert_array_equal(kept, before)
    recovered = ask(penalties.problem, x + 0.01, 1e-4, 1e-4, failed.carry)
    assert recovered.work.units == warm.work.units
    assert recovered.value == warm.value


def test_the_adjoint_never_inherits_the_tolerance_of_the_state(penalties):
    x = penalties.x0
    loose, tight = (ask(penalties.problem, x, 1e-1, adjoint) for adjoint in (1e-1, 1e-8))
    np.testing.assert_array_equal(loose.carry.y, tight.carry.y)
    assert loose.achieved.state == tight.achieved.state
    assert tight.achieved.adjoint <= 1.01e-8
    assert loose.achieved.adjoint > 1e-3
    coarse, fine = (ask(penalties.problem, x, state, 1e-1) for state in (1e-1, 1e-9))
    assert fine.achieved.state <= 1e-9
    assert fine.achieved.adjoint > 1e-6
    assert coarse.work.lower_gradients < fine.work.lower_gradients
    # No adjoint is asked for: none is solved, and the bounds say what that costs.
    nothing = ask(penalties.problem, x, 1e-3, jnp.inf)
    assert nothing.work.hessian_products < loose.work.hessian_products + 20
    truth = exact("penalties").at(exact("penalties").x0)
    assert abs(float(nothing.value) - truth.value) <= nothing.value_error


def test_a_hopeless_point_costs_less_and_its_interval_still_holds(penalties):
    x = jnp.full((5, 3), 3.0)
    d = exact("penalties")
    truth = d.at(np.full(15, 3.0))
    full = ask(penalties.problem, x, 1e-3, 1e-8)
    early = ask(penalties.problem, x, 1e-3, 1e-8, cutoff=jnp.asarray(0.5 * truth.value))
    assert early.work.units < full.work.units
    value, gradient = errors(early, truth)
    assert value <= early.value_error
    assert gradient <= early.gradient_error
    hopeful = ask(penalties.problem, x, 1e-3, 1e-8, cutoff=jnp.asarray(2 * truth.value))
    assert hopeful.value == full.value
    # Nor is the state solved for to the end, once it is certain that it is not worth it.
    tight, cut = (
        ask(penalties.problem, x, 1e-9, 1e-8, cutoff=jnp.asarray(factor * truth.value))
        for factor in (2.0, 0.5)
    )
    assert cut.achieved.state > 1e-9
    assert cut.work.lower_gradients < tight.work.lower_gradients
    assert abs(float(cut.value) - truth.value) <= cut.value_error


def test_the_work_of_a_quadratic_is_what_theory_says():
    A = jnp.diag(jnp.linspace(1.0, 20.0, 8))
    problem = tolerax.Bilevel(
        lambda y, x: jnp.sum((y - 1) ** 2),
        lambda y, x: 0.5 * y @ (A @ y) - jnp.sum(x * y),
        jnp.zeros(8),
        strong_convexity=1.0,
        self_concordance=0.0,
        upper_smoothness=2.0,
        cross=lambda y, q, x: tolerax.problems.CrossBounds(1.0, 0.0, 0.0),
    )
    work = ask(problem, jnp.ones(8), 1e-6, 1e-6).work
    assert work.points == work.values == work.gradients == 1
    assert work.units == work.lower_gradients + work.hessian_products
    # One Newton step whose CG ends within 8 iterations; the adjoint as many, its guess, its check;
    # and one product that the given smoothness is held against.
    assert work.lower_gradients == 2
    assert work.linear_iterations <= 16
    assert work.hessian_products == work.linear_iterations + 3


@pytest.mark.parametrize("name", ["penalties", "variation"])
def test_derivatives_of_the_solution(name):
    """dy/dx = -H^-1 F_x, against a dense solve; the report says how the backward solve went."""
    rng = np.random.default_rng(3)
    d = exact(name)
    x = some_x(name, rng)
    truth = d.at(x)
    weights = rng.normal(size=truth.y.shape)
    solve = np.linalg.solve(d.hessian(truth.y, x), weights)
    expected = -np.asarray(d.cross(truth.y, x)).T @ solve
    problem = MAKE[name]().problem

    @eqx.filter_jit
    def slopes(x, tolerance, report):
        def loss(x, report):
            y = problem.solution(d.x_of(x), Accuracy(tolerance, tolerance), report)
            return jnp.vdot(jax.flatten_util.ravel_pytree(y)[0], weights)

        return jax.grad(loss, argnums=(0, 1))(x, report)

    scale = np.linalg.norm(expected)
    for tolerance, allowed in ((1e-3, 0.05), (1e-9, 1e-6)):
        slope, report = slopes(jnp.asarray(x), tolerance, BackwardReport.blank())
        assert np.linalg.norm(slope - expected) <= allowed * scale
        assert 0 < report.error <= 1.01 * tolerance
        assert report.products > 0
        assert (
            report.residual <= np.sqrt(np.linalg.norm(d.hessian(truth.y, x), 2)) * report.error * 30
        )


def test_jit_shares_one_compilation_over_tolerances_and_points(penalties):
    traces = []

    @eqx.filter_jit
    def compiled(problem, query):
        traces.append(1)
        return problem.evaluate(query)

    for x, accuracy in ((-3.0, 1e-2), (-4.0, 1e-5), (-2.0, jnp.inf)):
        query = Query(jnp.full((5, 3), x), Accuracy(accuracy, accuracy))
        compiled(penalties.problem, query)
    assert len(traces) == 1


def test_arguments_that_make_no_problem():
    cost = lambda y, x: jnp.sum(y)  # noqa: E731
    with pytest.raises(ValueError, match="either residual or potential"):
        Implicit(cost, jnp.zeros(2), norm=None)
    with pytest.raises(ValueError, match="either residual or potential"):
        Implicit(cost, jnp.zeros(2), residual=cost, potential=cost, norm=None)
    for y0 in (jnp.zeros(2, int), jnp.zeros(2, complex), [], {"a": jnp.zeros(1), "b": 1}):
        # Under test the annotation refuses most of these first, with a TypeError of its own.
        with pytest.raises(TypeError):
            Implicit(cost, y0, potential=cost, norm=None)
