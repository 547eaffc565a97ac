"""`check_gradient` passes what is right and names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax.inner import Laplacian
from tolerax.problems import MatchedSchur
from tolerax.problems.library import semilinear_control

X = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.7)}


def smooth(x):
    return jnp.sum(jnp.sin(x["a"])) * jnp.exp(x["b"])


def test_right_derivatives_pass_with_slope_2():
    found = tolerax.check_gradient(tolerax.Objective(smooth), X, hessian=True)
    assert found.passed
    assert [block.name for block in found.blocks][:2] == [
        "gradient in x['a']",
        "gradient in x['b']",
    ]
    for block in found.blocks[:2]:
        assert block.error < 1e-7
        assert 1.9 < block.slope < 2.1


def test_the_leaf_with_the_wrong_gradient_is_named():
    def gradient(x):
        right = jax.grad(smooth)(x)
        return {"a": right["a"], "b": 1.01 * right["b"]}

    found = tolerax.check_gradient(tolerax.Objective(smooth, gradient=gradient), X)
    assert found.wrong == ("gradient in x['b']",)
    assert 0.8 < found.blocks[1].slope < 1.2
    assert "WRONG" in str(found)


def test_python_code_is_checked_too():
    right = tolerax.Objective(lambda x: float(np.sum(x**3)), gradient=lambda x: 3 * x**2, host=True)
    assert tolerax.check_gradient(right, jnp.ones(3)).passed


@jax.custom_jvp
def wrong_cube(y):
    return y**3


@wrong_cube.defjvp
def _(primals, tangents):
    (y,), (t,) = primals, tangents
    return y**3, 2 * y**2 * t


def test_blocks_of_other_problems_are_named():
    cost = lambda y, u: jnp.sum(y**2) + jnp.sum(u**2)  # noqa: E731
    pair = (jnp.array([0.5, 1.0]), jnp.array([0.2, -0.3]))
    full = tolerax.problems.FullSpace(
        cost, lambda y, u: wrong_cube(y) - u, lambda y, u: MatchedSchur(Laplacian((2,)), 1.0, 0.0)
    )
    found = tolerax.check_gradient(full, pair)
    assert found.wrong == ("residual in y", "constraints in x[0]")
    moving = tolerax.TimeDependent(
        lambda t, y, u: u - wrong_cube(y),
        None,
        jnp.ones(2),
        running_cost=lambda t, y, u: jnp.sum(y**2),
        method=tolerax.ImplicitEuler(2),
    )
    assert tolerax.check_gradient(moving, pair[0]).wrong == ("vector_field in y", "gradient in x")
    constrained = tolerax.Objective(
        lambda x: jnp.sum(x**2), constraints=wrong_cube, constraint_bounds=(0.0, 0.0)
    )
    assert tolerax.check_gradient(constrained, pair[0]).wrong == ("constraints in x",)


def test_float32_is_no_wrong_derivative():
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), X)
    found = tolerax.check_gradient(tolerax.Objective(smooth), x, hessian=True)
    assert found.passed, str(found)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_residual_with_a_wrong_derivative_is_named(wrong):
    p = semilinear_control(7)
    cube = wrong_cube if wrong else lambda y: y**3
    h2 = 1 / 64
    problem = tolerax.PDEConstrained(
        lambda y, u: h2 * (p.laplacian.mv(y) + cube(y) - u),
        p.cost,
        jnp.zeros((7, 7)),
        riesz=p.problem.norm.riesz,
        stability=1.0,
        curvature=0.0,
        smoothness=1.0,
        cross=lambda y, q, u: tolerax.problems.CrossBounds(1.0, 0.0, 0.0),
        symmetric=True,
        monotone=True,
    )
    found = tolerax.check_gradient(problem, p.optimum, hessian=not wrong)
    assert found.passed != wrong
    assert ("residual in y" in found.wrong) == wrong
    assert not {"cost in y", "cost in x", "residual in x"} & set(found.wrong)
