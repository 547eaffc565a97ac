"""The shape of the contract: four small solvers of different families, on problems they cannot see.

Each runs compiled, from the host and resumed, and gets the same bits. (The loop promises that only
for the same program; where compiled and host programs sum in different orders, runs on larger
problems agree to rounding.)
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
    def honours_constraints(self):
        return True

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


class CBOState(eqx.Module):
    x: jax.Array
    consensus: jax.Array
    key: jax.Array
    carry: object
    spread: jax.Array


class TinyCBO(Solver):
    """Consensus-based optimization: particles drift to a weighted mean, noise shrinks with them."""

    particles: int = eqx.field(static=True, default=30)
    alpha: float = 1e3
    tol: float = 1e-4

    def init(self, start):
        key, first = jax.random.split(start.key)
        n = self.particles
        noise = jax.random.normal(first, (n, start.x.size))
        carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), start.carry)
        return CBOState(start.x[None] + noise, start.x, key, carry, jnp.array(jnp.inf))

    def ask(self, state):
        n = self.particles
        accuracy = Accuracy(jnp.full(n, 1e-6), jnp.full(n, 1e-6))
        return Query(state.x, accuracy, state.carry, jnp.ones(n, bool), derivatives=0)

    def tell(self, state, query, evaluation):
        bad = (evaluation.status == PointStatus.failed) | ~query.mask
        energy = jnp.where(bad, jnp.inf, evaluation.value)
        lowest = jnp.min(energy, initial=jnp.finfo(energy.dtype).max)
        w = jnp.exp(-self.alpha * (energy - lowest))  # a value that failed has weight 0
        mean = w @ query.x / jnp.maximum(jnp.sum(w), 1e-300)
        mean = jnp.where(jnp.any(~bad), mean, state.consensus)
        away = query.x - mean[None]
        key, now = jax.random.split(state.key)
        x = query.x - 0.2 * away + 0.5 * away * jax.random.normal(now, away.shape)
        return CBOState(x, mean, key, evaluation.carry, jnp.max(jnp.abs(away)))

    def terminate(self, state):
        done = state.spread <= self.tol
        return done, Status.where(done, Status.converged, Status.running)

    def verify(self, state, evaluation):
        return jnp.isfinite(evaluation.value)  # a scalar: one point, not a batch


class PollState(eqx.Module):
    x: jax.Array
    f: jax.Array
    radius: jax.Array
    half: jax.Array
    lower: jax.Array
    upper: jax.Array


class TinyPoll(Solver):
    """Direct search that polls the coordinates forward, then backward, and halves its radius."""

    tol: float = 1e-5

    @property
    def honours_bounds(self):
        return True

    def init(self, start):
        one = jnp.array(1.0)
        return PollState(start.x, jnp.inf * one, one, jnp.array(1), *start.bounds)

    def ask(self, state):
        # Row 0 is the incumbent, evaluated until its value is known.
        n, x = state.x.size, state.x
        known = jnp.isfinite(state.f)
        points = x[None] + state.radius * state.half * jnp.eye(n + 1, n, -1)
        points = jnp.clip(points, state.lower[None], state.upper[None])
        new = known & jnp.any(points != x[None], axis=1)
        mask = new.at[0].set(~known)
        return Query(points, Accuracy(jnp.zeros(n + 1), jnp.zeros(n + 1)), None, mask, 0)

    def tell(self, state, query, evaluation):
        # Failed points are no points; those that a budget masked out were never evaluated.
        usable = query.mask & (evaluation.status != PointStatus.failed)
        f = jnp.where(usable, evaluation.value, jnp.inf)
        i = jnp.argmin(f)
        known = jnp.isfinite(state.f)
        better = f[i] < state.f - jnp.where(known, 1e-4 * state.radius**2, 0)
        failed = known & ~better & (state.half < 0)
        radius = jnp.where(failed, state.radius / 2, state.radius)
        half = jnp.where(better, state.half, -state.half)
        x, f = jnp.where(better, query.x[i], state.x), jnp.where(better, f[i], state.f)
        return PollState(x, f, radius, half, state.lower, state.upper)

    def terminate(self, state):
        done = state.radius <= self.tol
        return done, Status.where(done, Status.converged, Status.running)


class Python(Problem):
    """A function of NumPy arrays, called once a point that is not masked out."""

    fun: object = eqx.field(static=True)
    bounds: object = None
    calls: list = eqx.field(static=True, default_factory=list)

    @property
    def host(self):
        return True

    def evaluate(self, query):
        if isinstance(query.mask, jax.core.Tracer):  # only the shapes are wanted
            return exact_evaluation(jnp.zeros(query.mask.shape), None, Work())
        mask = np.asarray(query.mask)
        values = [self.fun(x) if m else 0.0 for x, m in zip(np.asarray(query.x), mask, strict=True)]
        self.calls.append(int(mask.sum()))
        return exact_evaluation(jnp.asarray(values), None, Work(points=mask.sum()))


# Exact in any order of operations up to its last sum, so NumPy and XLA agree to the bit.
def parabola(x):
    return (x[0] - 1) ** 2 + (x[1] + 2) ** 2


def parabola_with_holes(x):
    return jnp.where(jnp.sin(40 * x[0]) > 0.9, jnp.nan, parabola(x))


BOX = (jnp.array([-3.0, -1.5]), jnp.array([3.0, 3.0]))

CASES = {
    "newton": (Objective(rosenbrock), TinyNewton(), [-1.2, 1.0], [1.0, 1.0], 1e-6),
    "constrained": (CIRCLE, TinySQP(), [-1.1, -2.0], [-1.0, -2.0], 1e-7),
    "cbo": (Objective(parabola_with_holes), TinyCBO(), [0.0, 0.0], [1.0, -2.0], 1e-2),
    "poll": (Objective(parabola, bounds=BOX), TinyPoll(), [0.0, 0.0], [1.0, -1.5], 1e-4),
}


def arrays(run):
    def plain(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(plain, eqx.filter((run.solver_state, run.best, run.work), eqx.is_array))


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_compiled_from_the_host_and_resumed(case):
    problem, solver, start, minimum, tolerance = CASES[case]
    start = jnp.array(start)
    compiled = solve(problem, solver, start)
    assert bool(compiled.success), compiled.message
    np.testing.assert_allclose(compiled.x, minimum, atol=tolerance)
    steps = []
    hosted = solve(problem, solver, start, callback=lambda step: steps.append(step.number))
    assert steps == list(range(1, int(compiled.steps) + 1))
    part = solve(problem, solver, start, max_steps=4)
    resumed = solve(problem, solver, part.state)
    for other in (hosted, resumed):
        jax.tree.map(np.testing.assert_array_equal, arrays(other.state), arrays(compiled.state))


def test_python_code_gets_the_same_points_as_compiled_code():
    python = Python(parabola, BOX)
    hosted = solve(python, TinyPoll(), jnp.zeros(2))
    compiled = solve(Objective(parabola, bounds=BOX), TinyPoll(), jnp.zeros(2))
    np.testing.assert_array_equal(hosted.x, compiled.x)
    assert int(hosted.steps) == int(compiled.steps)
    assert int(hosted.work.points) == sum(python.calls)


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_budgets_in_points_are_kept_to_the_point(limit):
    python = Python(parabola, BOX)
    solution = solve(python, TinyPoll(), jnp.zeros(2), max_work={"points": limit})
    assert sum(python.calls) == int(solution.work.points) == limit
    assert bool(solution.status == Status.budget)


def test_lanes_of_vmap_get_what_single_runs_get():
    problem, solver = Objective(parabola_with_holes), TinyCBO()
    keys = jax.random.split(jax.random.key(1), 3)
    lanes = jax.vmap(lambda key: solve(problem, solver, jnp.zeros(2), key=key).x)(keys)
    single = solve(problem, solver, jnp.zeros(2), key=keys[2]).x
    # vmap may order the sums of the weighted mean differently: equal to rounding, amplified by
    # alpha in the weights and damped by the collapse.
    np.testing.assert_allclose(lanes[2], single, atol=1e-6)
