"""Implicit Euler: values, gradients, Hessian products and bounds beside dense steps that are solved
to rounding and differentiated by JAX."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tolerax import Accuracy, ImplicitEuler, PointStatus, Query, TimeDependent
from tolerax.contracts import product

N, STEPS, WEIGHT = 4, 11, 0.2
DT = 0.9 / STEPS
STIFF = 5.0 * (2 * jnp.eye(N) - jnp.eye(N, k=1) - jnp.eye(N, k=-1))


def field(t, y, u):
    """A bistable reaction with diffusion: not monotone, with a symmetric derivative."""
    return {"y": -STIFF @ y["y"] + 3 * (y["y"] - y["y"] ** 3) + jnp.cos(t) * u["c"] * u["gain"]}


def running(t, y, u):
    return 0.5 * WEIGHT * jnp.sum((y["y"] - t) ** 2 * (1 + 0.1 * u["c"] ** 2))


def final(y, x):
    return WEIGHT * (jnp.sum(y["y"] ** 4) + 0.1 * jnp.sum(x["c"] ** 2))


def start(x):
    return {"y": jnp.sin(x["gain"] * jnp.arange(1.0, N + 1))}


def controls(x):
    return {"c": x["c"], "gain": jnp.broadcast_to(x["gain"], STEPS)}


def make(**options):
    diffusion = lambda dt: lambda r: {"y": jnp.linalg.solve(jnp.eye(N) + dt * STIFF, r["y"])}  # noqa: E731
    return TimeDependent(
        field,
        final,
        start,
        running_cost=running,
        controls=controls,
        times=(0.1, 1.0),
        weight=WEIGHT,
        metric={"c": jnp.asarray(WEIGHT * DT), "gain": jnp.asarray(1.0)},
        method=ImplicitEuler(STEPS, symmetric=True, preconditioner=diffusion, **options),
    )


@jax.jit
def plain(x):
    """The same cost, by Newton's method with dense matrices."""

    def step(y, inputs):
        u, n = inputs
        t = 0.1 + (n + 1) * DT
        f = lambda z: field(t, {"y": z}, u)["y"]  # noqa: E731
        z = y
        for _ in range(5):
            z = z - jnp.linalg.solve(jnp.eye(N) - DT * jax.jacfwd(f)(z), z - y - DT * f(z))
        return z, DT * running(t, {"y": z}, u)

    y, costs = jax.lax.scan(step, start(x)["y"], (controls(x), jnp.arange(STEPS)))
    return final({"y": y}, x) + jnp.sum(costs)


@eqx.filter_jit
def evaluate(problem, x, accuracy, derivatives=2):
    return problem.evaluate(Query(x, accuracy, derivatives=derivatives))


@eqx.filter_jit
def times(hessian, v, tolerance):
    return product(hessian, v, tolerance)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {"c": jnp.asarray(rng.normal(size=(STEPS, N))), "gain": jnp.asarray(rng.normal())}


@pytest.fixture(scope="module", params=["stored", "in segments"])
def problem(request):
    return make() if request.param == "stored" else make(store_up_to=0)


def test_errors_are_below_their_bounds_and_near_them(problem):
    x = drawn(0)
    value, gradient = jax.value_and_grad(plain)(x)
    rounding = 1e-13 * float(problem.dual_norm(gradient))
    products = []
    for tolerance in (1e-1, 1e-3, 1e-5, 1e-8):
        found = evaluate(problem, x, Accuracy(tolerance, tolerance))
        off = jax.tree.map(jnp.subtract, found.gradient, gradient)
        error = float(problem.dual_norm(off))
        assert error <= float(found.gradient_error) + rounding
        assert float(found.gradient_error) <= 20 * error + 20 * rounding
        assert abs(float(found.value - value)) <= float(found.value_error)
        assert found.status == PointStatus.ok
        products.append(int(found.work.linear_iterations))
    # A looser tolerance takes less work.
    assert products == sorted(products)
    assert products[0] < products[-1]
    assert not found.provenance.certified


def test_the_two_tolerances_are_apart(problem):
    x = drawn(1)
    both = [
        evaluate(problem, x, Accuracy(state, adjoint))
        for state, adjoint in ((1e-8, 1e-2), (1e-2, 1e-8))
    ]
    parts = [found.gradient_error_parts for found in both]
    assert parts[0].state < 1e-3 * parts[0].adjoint
    assert parts[1].adjoint < 1e-3 * parts[1].state
    for found, asked in zip(both, ((1e-8, 1e-2), (1e-2, 1e-8)), strict=True):
        # What is asked of the whole is shared among the steps; errors may still add up.
        assert found.achieved.state <= 2 * asked[0]
        assert found.achieved.adjoint <= 2 * asked[1]


def test_hessian_products(problem):
    x, v = drawn(2), drawn(3)
    exact = jax.jit(lambda x, v: jax.jvp(jax.grad(plain), (x,), (v,))[1])(x, v)
    hessian = evaluate(problem, x, Accuracy(1e-11, 1e-11)).hessian
    size = float(problem.dual_norm(exact))
    for tolerance in (1e-1, 1e-4, 1e-9):
        found = times(hessian, v, jnp.asarray(tolerance))
        off = float(problem.dual_norm(jax.tree.map(jnp.subtract, found.vector, exact)))
        assert off <= float(found.error)
        np.testing.assert_allclose(found.error, tolerance * size, rtol=0.2)


def test_the_gauss_newton_product_is_nowhere_against_the_direction(problem):
    x = drawn(4)
    hessian = evaluate(problem, x, Accuracy(1e-6, 1e-6)).hessian.gauss_newton()
    for seed in range(5, 8):
        v = drawn(seed)
        assert ravel_pytree(v)[0] @ ravel_pytree(times(hessian, v, jnp.asarray(1e-6)).vector)[0] > 0


def test_a_batch_of_parameters_one_of_which_has_no_trajectory():
    # z = y + dt exp(z + x): from 0, ten steps of 0.1 exist for x = -2, for x = 2 not even one.
    problem = TimeDependent(
        lambda t, y, x: jnp.exp(y + x),
        lambda y, x: y,
        jnp.array(0.0),
        method=ImplicitEuler(10, symmetric=True),
    )

    def last(x):
        y = 0.0
        for _ in range(10):
            z = y
            for _ in range(30):
                z = y + 0.1 * np.exp(z + x)
            y = z
        return y

    x = jnp.array([-2.0, 2.0, jnp.nan, 0.0])
    query = Query(x, Accuracy(1e-10, 1e-10), mask=jnp.array([True, True, True, False]))
    found = eqx.filter_jit(problem.evaluate)(query)
    np.testing.assert_allclose(found.value[0], last(-2.0), rtol=1e-12)
    slope = (last(-2.0 + 1e-5) - last(-2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(found.gradient[0], slope, rtol=1e-8)
    status = np.asarray(found.status._value)
    assert status[0] == PointStatus.ok._value
    assert status[1] in (PointStatus.inaccurate._value, PointStatus.failed._value)
    assert status[2] == PointStatus.failed._value
    assert found.work.points == 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_preconditioner_of_the_wrong_sign_leaves_nothing_known(symmetric):
    problem = TimeDependent(
        lambda t, y, u: u - y,
        lambda y, x: jnp.sum(y**2),
        jnp.ones(2),
        method=ImplicitEuler(2, preconditioner=lambda dt: lambda r: -r, symmetric=symmetric),
    )
    found = evaluate(problem, jnp.ones(2), Accuracy(1e-6, 1e-6), 1)
    assert found.status == PointStatus.inaccurate
    assert found.gradient_error == found.value_error == np.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": None, "running_cost": None}, ValueError, "give at least one"),
        ({"times": (1.0, 0.0)}, ValueError, r"times is \(1\.0, 0\.0\)"),
        ({"weight": 0.0}, ValueError, r"weight is 0\.0"),
        ({"y0": ()}, TypeError, "y0 must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {"vector_field": field, "cost": final, "y0": jnp.zeros(2), **change}
    with pytest.raises(error, match=message):
        TimeDependent(given.pop("vector_field"), given.pop("cost"), given.pop("y0"), **given)


@pytest.mark.parametrize(
    "unlike", [lambda f: f[:-1], lambda f: {"q": f}, lambda f: f[:, None]], ids=["7", "dict", "2d"]
)
def test_a_field_unlike_the_state_is_named(unlike):
    problem = TimeDependent(lambda t, y, u: unlike(u - y), lambda y, x: jnp.sum(y), jnp.ones(3))
    with pytest.raises(ValueError, match=r"vector_field returns .*, but y0 is f64"):
        problem.evaluate(Query(jnp.ones(3), Accuracy(1.0, 1.0)))


def test_bad_steps_and_controls_are_named():
    with pytest.raises(TypeError, match=r"method is 'euler': give .* `tolerax.ImplicitEuler"):
        TimeDependent(field, final, jnp.zeros(2), method="euler")
    with pytest.raises(ValueError, match="steps is 0"):
        ImplicitEuler(0)
    problem = TimeDependent(
        lambda t, y, u: u,
        lambda y, x: y,
        jnp.array(0.0),
        controls=lambda x: x,
        method=ImplicitEuler(10),
    )
    with pytest.raises(ValueError, match=r"lengths \[3\]: .* a divisor of the 10 steps"):
        problem.evaluate(Query(jnp.ones(3), Accuracy(1.0, 1.0)))
