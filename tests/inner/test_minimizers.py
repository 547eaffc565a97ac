"""Lower-level solvers: what they certify is true, and they say so when they cannot.

Why a Newton step certifies its end: with H d = -r + rho the gradient at y + d is -rho + (G - H)d,
G being the mean Hessian over the step. |rho|_{H^-1} is the error of CG in the energy norm,
(G - H)d is at most excess(M|d|) |d|_H, and H(y + d) >= exp(-M|d|) H carries the sum over to the
norm at y + d.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from tests.inner.functions import (
    cases,
    distances,
    logistic,
    minimizer,
    quadratic,
    variation,
)
from tolerax.inner import LBFGS, AcceleratedGradient, NewtonCG
from tolerax.inner.minimizers import Smooth
from tolerax.status import PointStatus

NEWTON, GRADIENTS = NewtonCG(), (LBFGS(), AcceleratedGradient())
SOLVERS = (NEWTON, *GRADIENTS)
IDS = [type(solver).__name__ for solver in SOLVERS]
TOLERANCES = 10.0 ** np.arange(0, -13, -2)
CASES = cases(np.random.default_rng(0))


@functools.cache
def solution_of(which):
    return minimizer(CASES[which].h, len(CASES[which].d))


@eqx.filter_jit
def solve(solver, h, d, m, y, tolerance):
    return solver(Smooth(h, d, m), y, tolerance)


def run(solver, case, y, tolerance, **changes):
    return minimize(
        solver, case.h, changes.get("d", case.d), changes.get("m", case.m), y, tolerance
    )


def minimize(solver, h, d, m, y, tolerance):
    y = jnp.asarray(y)
    d, m = jnp.asarray(d, y.dtype), jnp.asarray(m, y.dtype)
    return solve(solver, h, d, m, y, jnp.asarray(tolerance))


def status(answer):
    names = ("ok", "inaccurate", "floor", "failed")
    return next(n for n in names if bool(answer.status == getattr(PointStatus, n)))


def check(case, solution, answer, tolerance):
    energy, euclidean, r, _ = distances(case, answer.y, solution)
    assert energy <= answer.distance
    assert case.m * euclidean <= answer.exponent * (1 + 1e-9)
    assert (status(answer) == "ok") == bool(answer.distance <= tolerance)
    np.testing.assert_allclose(
        answer.residual, r, atol=float(answer.rounding * np.sqrt(case.d.max())) + 1e-15
    )
    # No given constant of these functions is wrong.
    assert answer.third <= 1.1 * case.m + 1e-6
    assert answer.curvature >= 0.99


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
@pytest.mark.parametrize("which", range(len(CASES)), ids=[case.name for case in CASES])
def test_the_certified_distance_holds_at_every_tolerance_from_every_start(which, solver):
    case, solution = CASES[which], solution_of(which)
    rng = np.random.default_rng(which)
    n = len(case.d)
    starts = {
        "zero": np.zeros(n),
        "near": solution.astype(float) + 1e-3 * rng.normal(size=n),
        "far": 1e3 * rng.normal(size=n) / np.sqrt(n),
    }
    soft = case.name == "quadratic 4" or case.name == "logistic -8"
    for name, start in starts.items():
        for tolerance in TOLERANCES:
            answer = run(solver, case, start, tolerance)
            check(case, solution, answer, tolerance)
            # Where eps |H| |y| / sqrt(min D) exceeds the tolerance there is nothing to be done.
            if tolerance > 2 * answer.rounding:
                assert status(answer) == "ok" or (soft and solver is not NEWTON), (name, tolerance)
            elif tolerance < answer.rounding:
                assert status(answer) == "floor"


def test_newton_needs_few_products_and_no_more_than_a_decade_of_accuracy():
    """The certificate costs nothing extra: the last step is solved to the tolerance, not beyond."""
    case, solution = CASES[3], solution_of(3)
    for tolerance in (1e-2, 1e-4, 1e-6):
        answer = run(NEWTON, case, np.zeros(len(case.d)), tolerance)
        energy, *_ = distances(case, answer.y, solution)
        assert answer.distance <= 30 * energy
        assert answer.gradients + answer.products <= 80
    again = run(NEWTON, case, np.asarray(answer.y), 10 * float(answer.distance))
    assert again.gradients <= 2
    assert again.products <= 30


@pytest.mark.parametrize(
    "solver",
    [
        NewtonCG(max_steps=2),
        LBFGS(max_steps=4),
        AcceleratedGradient(max_steps=4),
        NewtonCG(max_cg_steps=1, max_steps=3),
    ],
)
def test_out_of_steps_is_inaccurate_with_an_honest_distance(solver):
    case, solution = CASES[3], solution_of(3)
    answer = run(solver, case, np.full(len(case.d), 5.0), 1e-9)
    assert status(answer) == "inaccurate"
    assert answer.distance > 1e-9
    check(case, solution, answer, 1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
@pytest.mark.parametrize("which", [0, 2, 5])
def test_float32_reaches_what_it_resolves_and_then_says_floor(which, solver):
    case = CASES[which]
    as_float32 = lambda leaf: jnp.asarray(leaf, jnp.float32)  # noqa: E731
    small = case._replace(h=jax.tree.map(as_float32, case.h), d=case.d.astype(np.float32))
    # The data are rounded too: the truth is that of the rounded function.
    exact = small._replace(h=jax.tree.map(lambda leaf: jnp.asarray(leaf, float), small.h))
    exact = exact._replace(d=case.d * (1 - 1e-6))
    solution = minimizer(exact.h, len(case.d))
    start = np.zeros(len(case.d), np.float32)
    outcomes = []
    for tolerance in (1e-1, 1e-2, 1e-9, 1e-12):
        answer = run(solver, small, start, tolerance)
        assert answer.y.dtype == answer.distance.dtype == np.float32
        energy, *_ = distances(exact, np.asarray(answer.y, float), solution)
        assert energy <= answer.distance
        outcomes.append(status(answer))
        if outcomes[-1] == "floor":
            assert answer.distance <= 1e-3
    assert outcomes == ["ok", "ok", "floor", "floor"]


class Broken(eqx.Module):
    """A convex function that is not a number beyond a wall, or everywhere."""

    wall: Float[Array, ""]

    def __call__(self, y):
        inside = 0.5 * jnp.sum((y - 1) ** 2)
        return jnp.where(jnp.max(y) < self.wall, inside, jnp.nan)


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_not_a_number_is_failed_at_the_start_and_avoided_on_the_way(solver):
    n = 3
    broken = minimize(solver, Broken(jnp.array(-1.0)), jnp.ones(n), 0.0, jnp.zeros(n), 1e-6)
    assert status(broken) == "failed"
    assert not broken.distance <= 1e-6
    # The wall lies between the first trial steps and the solution's neighbourhood.
    start = jnp.array([-3.0, 0.5, 0.0])
    fine = minimize(solver, Broken(jnp.array(1.5)), jnp.ones(n), 0.0, start, 1e-6)
    assert status(fine) == "ok"
    np.testing.assert_allclose(fine.y, np.ones(n), atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_start_that_is_not_finite_is_failed(solver, bad):
    case = CASES[2]
    start = np.zeros(len(case.d))
    start[1] = bad
    answer = run(solver, case, start, 1e-3)
    assert status(answer) == "failed"


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_a_function_without_minimizer_ends_without_a_claim(solver):
    """-|y|^2/2 is as little strongly convex as can be; D = 1 claims that it is."""
    h = lambda y: -0.5 * jnp.sum(y**2)  # noqa: E731
    answer = minimize(solver, h, jnp.ones(4), 0.0, jnp.arange(4.0) + 1, 1e-3)
    assert status(answer) != "ok"
    if solver is NEWTON:
        assert answer.curvature < 0


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_work_equals_the_calls(solver):
    """Counted by the functions themselves, as callbacks from compiled code."""
    case = CASES[3]
    calls = {"gradients": 0, "products": 0}

    def count(kind):
        jax.debug.callback(lambda: calls.__setitem__(kind, calls[kind] + 1))

    class Counting(Smooth):
        def value_and_gradient(self, y):
            count("gradients")
            return super().value_and_gradient(y)

        def hessian(self, y):
            product = super().hessian(y)

            def counted(v):
                count("products")
                return product(v)

            return counted

    lower = Counting(case.h, jnp.asarray(case.d), jnp.asarray(case.m))
    answer = eqx.filter_jit(solver)(lower, jnp.full(len(case.d), 5.0), jnp.asarray(1e-6))
    jax.effects_barrier()
    assert status(answer) == "ok"
    assert calls == {"gradients": answer.gradients, "products": answer.products}
    assert (answer.products > 0) == (solver is NEWTON)


def test_tolerances_starts_and_constants_share_one_compilation():
    traces = []
    case = CASES[2]

    @jax.jit
    def compiled(d, m, y, tolerance):
        traces.append(1)
        return NEWTON(Smooth(case.h, d, m), y, tolerance)

    for tolerance, m in ((1e-1, 2.0), (1e-8, 3.0)):
        compiled(jnp.asarray(case.d), m, jnp.zeros(len(case.d)), tolerance)
    assert len(traces) == 1


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_a_batch_equals_its_members(solver):
    case, solution = CASES[3], solution_of(3)
    starts = jnp.stack([jnp.zeros(len(case.d)), jnp.full(len(case.d), 3.0)])
    tolerances = jnp.array([1e-2, 1e-6])
    d, m = jnp.asarray(case.d), jnp.asarray(case.m)
    batch = jax.vmap(lambda y, t: solver(Smooth(case.h, d, m), y, t))(starts, tolerances)
    for i in range(2):
        single = run(solver, case, starts[i], tolerances[i])
        member = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        check(case, solution, member, float(tolerances[i]))
        assert abs(int(member.gradients) - int(single.gradients)) <= 1
        np.testing.assert_allclose(member.y, single.y, atol=10 * float(tolerances[i]))


def test_a_preconditioner_saves_products_and_changes_no_claim():
    rng = np.random.default_rng(4)
    scale = 10 ** rng.uniform(0, 3, size=16)
    Q, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    A = np.sqrt(scale)[:, None] * ((Q * np.linspace(1, 3, 16)) @ Q.T) * np.sqrt(scale)
    base = quadratic(rng, 0.0)
    A, b = jnp.asarray(0.5 * (A + A.T)), jnp.asarray(rng.normal(size=16))
    h = eqx.tree_at(lambda h: (h.A, h.b), base.h, (A, b))
    d = jnp.full(16, 0.9 * float(np.linalg.eigvalsh(A)[0]))
    plain = NEWTON(Smooth(h, d, jnp.array(0.0)), jnp.zeros(16), 1e-8)
    diagonal = jnp.diag(A)
    helped = NEWTON(Smooth(h, d, jnp.array(0.0), lambda y: diagonal), jnp.zeros(16), 1e-8)
    assert helped.products < plain.products
    case = base._replace(h=h, d=np.asarray(d))
    check(case, minimizer(h, 16), helped, 1e-8)
    inverse = jnp.linalg.inv(A)
    exact = NEWTON(
        Smooth(h, d, jnp.array(0.0), lambda y: lambda r: inverse @ r), jnp.zeros(16), 1e-8
    )
    assert exact.products < helped.products
    check(case, minimizer(h, 16), exact, 1e-8)


def test_lbfgs_begins_with_the_preconditioner():
    case = quadratic(np.random.default_rng(6), 3.0)
    inverse = jnp.linalg.inv(case.h.A)
    d, m, y = jnp.asarray(case.d), jnp.array(0.0), jnp.ones(16)
    plain = LBFGS()(Smooth(case.h, d, m), y, 1e-8)
    helped = LBFGS()(Smooth(case.h, d, m, lambda y: lambda r: inverse @ r), y, 1e-8)
    # The inverse Hessian itself: one step, and one more for what rounding left.
    assert helped.gradients <= 3 < plain.gradients
    check(case, minimizer(case.h, 16), helped, 1e-8)


@pytest.mark.parametrize("solver", [NEWTON, LBFGS()], ids=["NewtonCG", "LBFGS"])
@pytest.mark.parametrize("hook", [lambda y: lambda r: -r, lambda y: -jnp.ones_like(y)])
def test_a_preconditioner_of_the_wrong_sign_is_no_accuracy_floor(solver, hook):
    base = quadratic(np.random.default_rng(5), 1.0)
    wrong = Smooth(base.h, jnp.asarray(base.d), jnp.array(0.0), hook)
    answer = solver(wrong, jnp.ones(16), 1e-8)
    assert status(answer) == "inaccurate"
    # What is claimed of the point still holds, by strong convexity alone.
    check(base, minimizer(base.h, 16), answer, 1e-8)


@pytest.mark.parametrize("factor", [1.5, 2.0, 10.0, 100.0])
def test_too_large_strong_convexity_shows_in_the_curvature(factor):
    rng = np.random.default_rng(7)
    case = quadratic(rng, 3.0, looseness=1.0)
    answer = run(NEWTON, case, np.zeros(16), 1e-6, d=np.full(16, factor))
    assert answer.curvature < 0.99


@pytest.mark.parametrize(
    "case",
    [logistic(np.random.default_rng(0), -4.0, 1.0), variation(np.random.default_rng(0), 1.0, 0.01)],
    ids=["logistic", "variation"],
)
def test_the_third_derivative_of_what_is_not_quadratic_is_seen(case):
    answer = run(NEWTON, case, np.zeros(len(case.d)), 1e-4, m=0.0)
    assert 1e-3 * case.m <= answer.third <= case.m


def test_the_third_derivative_seen_is_a_lower_bound_even_on_long_steps():
    """h = sum exp(y_i) - c y_i has M = 1 exactly; steps of M|d| > 1 used to look like M > 1.1."""
    c = jnp.array([2.5, 2.0, 3.0, 1.5])
    h = lambda y: jnp.sum(jnp.exp(y) - c * y) + 0.5e-3 * jnp.sum(y**2)  # noqa: E731
    for start in (0.0, 0.5, -1.0):
        answer = minimize(NEWTON, h, jnp.full(4, 1e-3), 1.0, jnp.full(4, start), 1e-10)
        assert status(answer) == "ok"
        assert 0.3 <= answer.third <= 1
