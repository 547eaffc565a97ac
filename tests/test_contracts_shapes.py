"""The shape of the contract: four small solvers of different families, on problems they cannot see.

Each runs compiled, from the host and resumed, and gets the same bits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax import Objective, Status, solve
from tolerax.contracts import Accuracy, Problem, Query, Solver, Work, exact_evaluation
from tolerax.status import PointStatus


class Jacobian(eqx.Module):
    """Products with the derivative of `fun` at x, and with its transpose."""

    fun: object
    x: jax.Array

    def mv(self, v):
        return jax.jvp(self.fun, (self.x,), (v,))[1]

    def rmv(self, w):
        return jax.vjp(self.fun, self.x)[1](w)[0]


class Constrained(Problem):
    """Minimize `fun(x)` subject to `equal(x) = 0`."""

    fun: object
    equal: object
    bounds: None = None

    def evaluate(self, query):
        value, gradient = jax.value_and_grad(self.fun)(query.x)
        answer = exact_evaluation(value, gradient, Work(points=1))
        c = self.equal(query.x)
        new = (c, jnp.max(jnp.abs(c)), Jacobian(self.equal, query.x))
        where = lambda e: (e.constraints, e.violation, e.jacobian)  # noqa: E731
        return eqx.tree_at(where, answer, new, is_leaf=lambda leaf: leaf is None)


class SQPState(eqx.Module):
    x: jax.Array
    multipliers: jax.Array
    error: jax.Array


class TinySQP(Solver):
    """Full steps of sequential quadratic programming with the identity as Hessian, scaled."""

    scale: float = 2.0
    tol: float = 1e-9
    feasible_within: float = 1e-8

    @property
    def feasibility(self):
        return self.feasible_within

    def init(self, start):
        shape = start.answer(Query(start.x, Accuracy(0.0, 0.0), derivatives=2)).constraints.shape
        return SQPState(start.x, jnp.zeros(shape), jnp.array(jnp.inf))

    def ask(self, state):
        return Query(state.x, Accuracy(0.0, 0.0), derivatives=2)

    def error_at(self, multipliers, evaluation):
        left = evaluation.gradient + evaluation.jacobian.rmv(multipliers)
        return jnp.maximum(jnp.max(jnp.abs(left)), evaluation.violation)

    def tell(self, state, query, evaluation):
        c, g, n = evaluation.constraints, evaluation.gradient, state.x.size
        jac = jax.vmap(evaluation.jacobian.rmv)(jnp.eye(c.size))
        kkt = jnp.block([[self.scale * jnp.eye(n), jac.T], [jac, jnp.zeros((c.size, c.size))]])
        step = jnp.linalg.solve(kkt, -jnp.concatenate([g, c]))
        error = self.error_at(step[n:], evaluation)
        x = jnp.where(error <= self.tol, state.x, state.x + step[:n])
        return SQPState(x, step[n:], error)

    def terminate(self, state):
        done = state.error <= self.tol
        return done, Status.where(done, Status.converged, Status.running)

    def verify(self, state, evaluation):
        return self.error_at(state.multipliers, evaluation) <= 2 * self.tol


CIRCLE = Constrained(lambda x: x[0] + 2 * x[1], lambda x: jnp.array([x @ x - 5.0]))


def test_a_feasible_start_does_not_shadow_the_solution():
    # |x|^2 = 5 exactly: the start violates nothing, the iterates that follow do by rounding.
    solution = solve(CIRCLE, TinySQP(), jnp.array([1.0, -2.0]), max_steps=200)
    assert bool(solution.success), solution.message
    np.testing.assert_allclose(solution.x, [-1.0, -2.0], atol=1e-8)
    assert float(solution.violation) <= 1e-8


def test_slightly_infeasible_points_with_lower_values_do_not_shadow_the_solution():
    # The start counts as feasible and its value, -5.2, is below the minimum of -5.
    solver = TinySQP(feasible_within=0.5)
    solution = solve(CIRCLE, solver, jnp.array([-1.1, -2.05]), max_steps=200)
    assert bool(solution.success), solution.message
    assert float(solution.history.rows()["value"][0]) < -5.1
    np.testing.assert_allclose(solution.x, [-1.0, -2.0], atol=1e-8)


class NewtonState(eqx.Module):
    x: jax.Array
    f: jax.Array
    p: jax.Array
    step: jax.Array
    done: jax.Array
    products: jax.Array


class TinyNewton(Solver):
    """Newton's method by conjugate gradients on the Hessian of the answer, halving its steps."""

    tol: float = 1e-8

    def init(self, start):
        x, one = start.x, jnp.array(1.0)
        return NewtonState(x, jnp.inf * one, 0 * x, one, jnp.array(False), jnp.array(0))

    def ask(self, state):
        return Query(state.x + state.step * state.p, Accuracy(0.0, 0.0), derivatives=2)

    def tell(self, state, query, evaluation):
        f, g, b = evaluation.value, evaluation.gradient, jnp.vdot
        good = (evaluation.status != PointStatus.failed) & (f <= state.f)

        def iterate(cg):
            p, r, d, k = cg
            hd = evaluation.hessian.mv(d)
            a = b(r, r) / b(d, hd)
            r, old = r - a * hd, r
            return p + a * d, r, r + b(r, r) / b(old, old) * d, k + 1

        going = lambda cg: good & (b(cg[1], cg[1]) > 1e-4 * b(g, g)) & (cg[3] < 2 * g.size)  # noqa: E731
        p, _, _, k = jax.lax.while_loop(going, iterate, (0 * g, -g, -g, jnp.array(0)))
        p = jnp.where(b(p, g) < 0, p, -g)
        accepted = NewtonState(
            query.x, f, p, jnp.array(1.0), jnp.linalg.norm(g) <= self.tol, state.products + k
        )
        shorter = eqx.tree_at(lambda s: s.step, state, state.step / 2)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), accepted, shorter)

    def terminate(self, state):
        return state.done, Status.where(state.done, Status.converged, Status.running)

    def verify(self, state, evaluation):
        return jnp.linalg.norm(evaluation.gradient) <= 2 * self.tol

    def work(self, state):
        return Work(hessian_products=state.products)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def test_products_taken_in_tell_are_work():
    solution = solve(Objective(rosenbrock), TinyNewton(), jnp.array([-1.2, 1.0]))
    assert bool(solution.success), solution.message
    products = int(solution.state.solver_state.products)
    assert products > 10  # at least one a step, and Newton's method needs more than ten
    assert int(solution.work.hessian_products) == products
    # The claim is checked by one more answer, whose products the solver never saw.
    assert solution.history.rows()["hessian_products"][-1] == products
