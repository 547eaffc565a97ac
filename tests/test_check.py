"""`check_gradient` passes what is right and names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
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
