"""State and control at once: the optimum of a dense KKT system, work that depends neither on the
grid nor on the weight of the control, and what does not fit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance.zoo import name_of
from tolerax.inner import Laplacian
from tolerax.problems import FullSpace, MatchedSchur

SOLVER = tolerax.ExactAugmentedLagrangian(rtol=1e-6, atol=0.0)


class Control(eqx.Module):
    """Poisson's equation on a line. What changes is an array, so that a grid compiles once."""

    laplacian: Laplacian
    alpha: jax.Array
    sign: jax.Array

    @property
    def h(self):
        return self.laplacian.spacing[0]

    def cost(self, y, u):
        return 0.5 * self.h * (jnp.sum((y - 1) ** 2) + self.alpha * jnp.sum(u**2))

    def residual(self, y, u):
        return self.h * (self.laplacian.mv(y) - u)

    def preconditioner(self, y, u):
        return Signed(MatchedSchur(self.laplacian, self.alpha, 0.0), self.sign)


class Signed(eqx.Module):
    """A preconditioner that may have the wrong sign for state and control."""

    right: MatchedSchur
    sign: jax.Array
    work = tolerax.Work(pde_solves=2)

    def mv(self, a, b):
        a, b = self.right.mv(a, b)
        return jax.tree.map(lambda leaf: self.sign * leaf, a), b


class Method(eqx.Module):
    """A method with its arrays."""

    of: Control
    name: str = eqx.field(static=True)

    def __call__(self, y, u):
        return getattr(self.of, self.name)(y, u)


def run(n, alpha, sign=1.0):
    made = Control(Laplacian((n,)), jnp.asarray(alpha), jnp.asarray(sign))
    problem = FullSpace(*(Method(made, name) for name in ("cost", "residual", "preconditioner")))
    return made, tolerax.solve(problem, SOLVER, (jnp.zeros(n), jnp.zeros(n)), max_steps=60)


def test_the_optimum_is_that_of_the_dense_system_whatever_the_grid_and_the_weight():
    solves = []
    for n in (15, 31):
        for alpha in (1e-2, 1e-4, 1e-6):
            made, solution = run(n, alpha)
            assert name_of(solution.status) == "converged"
            h, eye, zero = made.h, np.eye(n), np.zeros((n, n))
            a = np.asarray(jax.jacobian(made.laplacian.mv)(jnp.zeros(n)))
            matrix = h * np.block([[eye, zero, a], [zero, alpha * eye, -eye], [a, -eye, zero]])
            best = np.linalg.solve(matrix, h * np.concatenate([np.ones(n), np.zeros(2 * n)]))
            y, u = solution.x
            # The norm of the residual is 1e-6 of that at 0, in which errors are at most twice it.
            np.testing.assert_allclose(y, best[:n], atol=1e-6)
            np.testing.assert_allclose(u, best[n : 2 * n], atol=1e-6 * np.abs(u).max())
            solves.append(int(solution.work.pde_solves))
    assert max(solves) <= 80
    # Weights apart by 1e4; a last step more or less takes ten or so.
    assert max(solves) <= 1.3 * min(solves)


def test_a_preconditioner_of_the_wrong_sign_ends_the_run():
    _, solution = run(7, 1e-2, -1.0)
    assert name_of(solution.status) == "inner_failed"
    assert "not positive definite" in solution.message


def test_what_does_not_fit_is_named():
    laplacian, x = Laplacian((7,)), (jnp.zeros(7), jnp.zeros(7))
    cost = lambda y, u: jnp.sum(y**2) + jnp.sum(u**2)  # noqa: E731
    residual = lambda y, u: laplacian.mv(y) - u  # noqa: E731
    query = tolerax.Query(x, tolerax.Accuracy(1.0, 1.0))
    shorter = FullSpace(cost, lambda y, u: (y - u)[:-1], lambda y, u: None)
    with pytest.raises(ValueError, match=r"residual returns f64\[6\], but the state is f64\[7\]"):
        shorter.evaluate(query)
    function = FullSpace(cost, residual, lambda y, u: abs)
    with pytest.raises(TypeError, match=r"preconditioner returned .*with `mv\(a, b\)`"):
        function.evaluate(query)
    capped = tolerax.PDEConstrained(residual, cost, x[0], bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"bounds are \(0\.0, 1\.0\).*`InexactNewton`"):
        capped.full_space(lambda y, u: MatchedSchur(laplacian, 1.0, 0.0))
