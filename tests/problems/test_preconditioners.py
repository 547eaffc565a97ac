"""Preconditioners of the lower-level Hessian: what they save, and that no claim rests on them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import tolerax
from tests.problems.truth import ask, exact, outcome, ridge
from tolerax.problems.library import tv_denoising

X = jnp.array([-2.0, -4.5])


class Inverse(eqx.Module):
    """`factor * r`, which has the wrong sign for a negative factor."""

    factor: float

    def mv(self, r):
        return jax.tree.map(lambda leaf: self.factor * leaf, r)


class Scalar(eqx.Module):
    """What its `mv` returns has another structure than what it takes."""

    def mv(self, r):
        return jnp.sum(r)


def test_lines_take_a_third_of_the_products_and_the_answers_agree():
    with_lines = tv_denoising(seed=3, size=24, pictures=2).problem
    without = tv_denoising(seed=3, size=24, pictures=2, preconditioner=None).problem
    helped, plain = (ask(problem, X, 1e-5, 1e-5) for problem in (with_lines, without))
    assert outcome(helped.status) == outcome(plain.status) == "ok"
    assert helped.work.hessian_products < 0.4 * plain.work.hessian_products
    assert abs(float(helped.value - plain.value)) <= helped.value_error + plain.value_error
    difference = np.linalg.norm(helped.gradient - plain.gradient)
    assert difference <= helped.gradient_error + plain.gradient_error
    # Both are close enough for that to mean something.
    assert helped.gradient_error < 0.01 * np.linalg.norm(plain.gradient)


@pytest.mark.parametrize("norm", ["energy", "euclidean"])
def test_the_inverse_hessian_leaves_little_to_do(norm):
    problem = exact("penalties").problem
    x, y0 = problem.x0, problem.y0
    hessian = jax.hessian(lambda v: problem.lower(v.reshape(y0.shape), x))

    class Exact(eqx.Module):
        inverse: jax.Array

        def mv(self, r):
            return (self.inverse @ r.reshape(-1)).reshape(r.shape)

    def preconditioner(y, x):
        return Exact(jnp.linalg.inv(hessian(y.reshape(-1))))

    def made(**options):
        known = {**problem.constants, **options, "norm": norm}
        return tolerax.Bilevel(problem.upper, problem.lower, y0, **known)

    plain = ask(made(preconditioner=None), x, 1e-6, 1e-6)
    helped = ask(made(preconditioner=preconditioner), x, 1e-6, 1e-6)
    assert outcome(helped.status) == outcome(plain.status) == "ok"
    assert helped.work.linear_iterations < 0.5 * plain.work.linear_iterations
    assert abs(float(helped.value - plain.value)) <= helped.value_error + plain.value_error


@pytest.mark.parametrize("kind", ["tree", "array"])
def test_one_of_the_wrong_sign_ends_the_run_without_an_answer(kind):
    if kind == "tree":
        base, x0 = ridge(strong_convexity=1.0, self_concordance=0.0, upper_smoothness=2.0), 1.0
        x0 = jnp.asarray(x0)
    else:
        ready = tv_denoising(seed=3, size=16, pictures=1)
        base, x0 = ready.problem, ready.x0
    where = lambda p: p.oracle.norm.preconditioner  # noqa: E731
    hook = lambda factor: lambda y, x: Inverse(factor)  # noqa: E731
    wrong, right = (
        eqx.tree_at(where, base, hook(f), is_leaf=lambda leaf: leaf is None) for f in (-1.0, 1.0)
    )
    solver = tolerax.InexactLineSearch()
    ended = tolerax.solve(wrong, solver, x0, max_steps=50)
    assert not ended.success
    assert ended.status == tolerax.Status.inner_failed
    assert "preconditioner" in ended.message
    assert tolerax.solve(right, solver, x0, max_steps=500).success


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda y, x: 2.0, r"preconditioner returned 2\.0: return a pytree like y"),
        (lambda y, x: y[0], r"preconditioner returned .* with shapes \(1, 8, 8\)"),
        (lambda y, x: lambda r: r, "or an operator whose `mv"),
        (lambda y, x: Scalar(), "mv of the preconditioner returned"),
    ],
)
def test_another_structure_is_refused(hook, message):
    problem = tv_denoising(size=8, pictures=1, preconditioner=hook).problem
    with pytest.raises(TypeError, match=message):
        problem.evaluate(
            tolerax.Query(X, tolerax.Accuracy(1e-2, 1e-2), problem.cold_start(), derivatives=1)
        )


def test_only_one_of_a_preconditioner_and_a_learned_one():
    with pytest.raises(ValueError, match="only one of both"):
        tolerax.Bilevel(
            lambda y, x: y @ y,
            lambda y, x: y @ y,
            jnp.zeros(2),
            preconditioner=lambda y, x: y,
            recycle=2,
        )
    # A ready-made problem gives way to what was asked for.
    assert "recycled" in tv_denoising(size=8, pictures=1, recycle=2).problem.cold_start().estimates


def test_derivatives_of_solutions_use_it_too():
    ready = tv_denoising(seed=3, size=16, pictures=1)
    plain = tv_denoising(seed=3, size=16, pictures=1, preconditioner=None)
    accuracy = tolerax.Accuracy(1e-8, 1e-8)
    slopes = [
        jax.grad(lambda x, p=p: p.upper(p.problem.solution(x, accuracy), x))(X)
        for p in (ready, plain)
    ]
    # Both are exact to about 1e-8 times the norm of the cross derivative, of order 10.
    np.testing.assert_allclose(*slopes, atol=1e-6)
    assert np.linalg.norm(ravel_pytree(slopes[0])[0]) > 1e-2
