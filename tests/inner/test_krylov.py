"""Conjugate gradients against dense algebra: every bound at every iteration.

Gauss-Radau. Let P^-1 A have its spectrum above mu. CG writes the squared energy error after k steps
as an integral of 1/t against a measure whose moments its coefficients know; a Gauss-Radau rule with
a node at mu bounds the integral from above, since the odd derivatives of 1/t are negative. Meurant
and Tichy give the bound as `gamma_k r'P^-1 r` with `gamma_0 = 1/mu` and
`gamma_{k+1} = (gamma_k - alpha_k) / (mu (gamma_k - alpha_k) + beta_{k+1})`. It is positive exactly
while mu lies below the smallest Ritz value: a negative weight proves that mu was too large.

Rounding. Residuals are wrong by about eps |A| |x|, hence energy errors by that over sqrt(min D).
It is part of the bound, so nothing is subtracted here.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tolerax.inner import CG

pytestmark = pytest.mark.accelerator

N = 24
SEEDS = st.integers(0, 2**32 - 1)


@eqx.filter_jit
def solve(A, b, d, tolerance, steps, guess, preconditioner, exact, relative=0.0):
    # As an array the iteration limit does not recompile.
    cg = eqx.tree_at(lambda cg: cg.max_steps, CG(), steps)
    return cg(
        lambda v: A @ v,
        b,
        lower_bound=d,
        tolerance=tolerance,
        relative=relative,
        guess=guess,
        preconditioner=preconditioner,
        exact_residual=exact,
    )


def run(A, b, d, tolerance=0.0, steps=1000, guess=None, preconditioner=None, exact=True, **more):
    zeros = np.zeros_like(b)
    return solve(
        A,
        b,
        jnp.asarray(d, b.dtype),
        tolerance,
        jnp.asarray(steps),
        zeros if guess is None else guess,
        jnp.asarray(d if preconditioner is None else preconditioner, b.dtype),
        exact,
        **more,
    )


def spd(rng, n, log_condition):
    """Random SPD matrices: any spectrum, scaled rows, or a diagonal plus low rank."""
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    spectrum = 10 ** rng.uniform(0, log_condition, size=n)
    kind = rng.integers(3)
    if kind == 0:
        A = (Q * spectrum) @ Q.T
    elif kind == 1:
        s = 10 ** rng.uniform(-log_condition / 4, log_condition / 4, size=n)
        A = s[:, None] * ((Q * np.sqrt(spectrum)) @ Q.T) * s
    else:
        low = Q[:, :3]
        A = np.diag(10 ** rng.uniform(-log_condition, 0, size=n)) + low @ low.T
    return 0.5 * (A + A.T)


def lower_bound(rng, A, looseness):
    """A diagonal below A: the smallest eigenvalue, or a scaled diagonal, times `looseness`."""
    scale = np.ones(len(A)) if rng.random() < 0.5 else np.diag(A)
    values = np.linalg.eigvalsh(A / np.sqrt(np.outer(scale, scale)))
    # Eigenvalues are known to a few eps |A|: what claims to be a lower bound has to be one.
    smallest = values[0] - 1e-14 * values[-1]
    assume(smallest > 0)
    return smallest * scale * looseness


def energy(A, e):
    return np.sqrt(max(e @ (A @ e), 0.0))


@settings(max_examples=60)
@given(
    seed=SEEDS,
    log_condition=st.sampled_from([0.0, 1.0, 3.0, 6.0, 9.0, 12.0]),
    looseness=st.sampled_from([1 - 1e-6, 0.5, 1e-4]),
    exact=st.booleans(),
)
def test_bounds_hold_after_every_number_of_steps(seed, log_condition, looseness, exact):
    rng = np.random.default_rng(seed)
    A = spd(rng, N, log_condition)
    d = lower_bound(rng, A, looseness)
    b = rng.normal(size=N) if rng.random() < 0.5 else A @ rng.normal(size=N)
    preconditioner = np.diag(A) if rng.random() < 0.5 else d
    guess = rng.normal(size=N) * rng.choice([0.0, 1.0, 1e3])
    x = np.linalg.solve(A, b)
    x = x + np.linalg.solve(A, b - A @ x)
    first = energy(A, guess - x)
    for steps in (0, 1, 2, 4, 8, 16, N, 2 * N, 200):
        answer = run(A, b, d, 0.0, steps, guess, preconditioner, exact)
        assert energy(A, np.asarray(answer.x) - x) <= answer.error
        assert first <= answer.first_error * (1 + 1e-12)
        assert answer.iterations <= steps
        assert answer.products == answer.iterations + 1 + exact
        assert answer.curvature >= 0.98  # a true lower bound is not contradicted
        if exact:
            np.testing.assert_array_equal(answer.residual, jnp.asarray(b) - A @ answer.x)


@settings(max_examples=30)
@given(seed=SEEDS, log_condition=st.sampled_from([1.0, 2.0, 3.0]))
def test_the_bound_is_sharp_where_the_lower_bound_is(seed, log_condition):
    """With mu at the smallest eigenvalue Radau comes close to the truth once it is resolved."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    spectrum = 10 ** np.linspace(0, log_condition, N)
    A = (Q * spectrum) @ Q.T
    A = 0.5 * (A + A.T)
    b = rng.normal(size=N)
    d = np.full(N, 0.999)
    x = np.linalg.solve(A, b)
    tolerance = 1e-4 * energy(A, x)
    answer = run(A, b, d, tolerance)
    error = energy(A, np.asarray(answer.x) - x)
    assert answer.converged
    assert error <= answer.error <= 1.01 * tolerance
    assert answer.error <= 100 * error
    assert answer.first_error <= 1.01 * energy(A, x)


def test_a_relative_tolerance_is_relative_to_the_guess():
    rng = np.random.default_rng(1)
    A = spd(rng, N, 2.0)
    d = np.full(N, 0.9 * np.linalg.eigvalsh(A)[0])
    b, guess = rng.normal(size=N), rng.normal(size=N)
    x = np.linalg.solve(A, b)
    answer = run(A, b, d, 0.0, guess=guess, relative=0.1)
    first = energy(A, guess - x)
    assert answer.converged
    assert energy(A, np.asarray(answer.x) - x) <= 0.1 * first
    # Nothing is left to do at a guess that is good already.
    dual = np.linalg.norm(np.asarray(answer.residual) / np.sqrt(d))
    again = run(A, b, d, 1.001 * dual, guess=np.asarray(answer.x))
    assert again.iterations == 0
    assert again.converged


def test_zero_and_single():
    b = np.zeros(N)
    A = np.eye(N)
    answer = run(A, b, np.full(N, 0.5))
    assert answer.error == answer.first_error == 0
    assert answer.converged
    assert answer.iterations == 0
    np.testing.assert_array_equal(answer.x, b)

    one = run(np.array([[4.0]]), np.array([8.0]), np.array([1.0]), 1e-12)
    assert one.converged
    assert one.iterations == 1
    np.testing.assert_allclose(one.x, [2.0], rtol=1e-15)


def test_tolerance_zero_ends_at_the_rounding_floor_and_does_not_claim_convergence():
    rng = np.random.default_rng(2)
    A = spd(rng, N, 3.0)
    b = rng.normal(size=N)
    answer = run(A, b, np.full(N, 0.5 * np.linalg.eigvalsh(A)[0]), 0.0)
    assert not answer.converged
    assert answer.iterations < 500
    assert 0 < answer.error <= 3 * answer.rounding


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e150])
@pytest.mark.parametrize("what", ["b", "A"])
def test_scaling_changes_nothing_but_the_scale(factor, what):
    rng = np.random.default_rng(3)
    A = spd(rng, N, 2.0)
    b = rng.normal(size=N)
    d = np.full(N, 0.5 * np.linalg.eigvalsh(A)[0])
    plain = run(A, b, d, 1e-6)
    if what == "b":
        x_scale = error_scale = factor
        other = run(A, factor * b, d, 1e-6 * error_scale)
    else:
        # |x|_A with x ~ 1/A scales as A^-1/2.
        x_scale, error_scale = 1 / factor, 1 / np.sqrt(factor)
        other = run(factor * A, b, factor * d, 1e-6 * error_scale)
    assert other.converged
    # Rounding differs, so the last step may be one more or less.
    assert abs(other.iterations - plain.iterations) <= 1
    error = energy(A, np.asarray(other.x) / x_scale - np.linalg.solve(A, b))
    assert error <= other.error / error_scale <= 1.01e-6


def test_errors_never_vanish_by_underflow():
    """Squares of 1e-200 are zero; the bound is not."""
    A, b = np.diag(np.arange(1.0, N + 1)), np.full(N, 1e-200)
    answer = run(A, b, np.ones(N), 0.0, steps=2)
    x = b / np.diag(A)
    error = 1e-200 * energy(A, (np.asarray(answer.x) - x) * 1e200)
    assert 0 < error <= answer.error <= 1e3 * error


@settings(max_examples=25)
@given(seed=SEEDS, log_condition=st.sampled_from([1.0, 3.0]))
def test_bounds_hold_in_float32(seed, log_condition):
    rng = np.random.default_rng(seed)
    A = spd(rng, N, log_condition).astype(np.float32)
    d = np.full(N, 0.5 * np.linalg.eigvalsh(A.astype(float))[0], np.float32)
    b = rng.normal(size=N).astype(np.float32)
    x = np.linalg.solve(A.astype(float), b.astype(float))
    for steps in (1, 3, 10, 100):
        answer = run(A, b, d, 0.0, steps, exact=steps % 2 == 1)
        assert answer.x.dtype == answer.error.dtype == np.float32
        assert energy(A.astype(float), np.asarray(answer.x, float) - x) <= answer.error


@settings(max_examples=20)
@given(seed=SEEDS, steps=st.sampled_from([1, 3, 20]))
def test_an_indefinite_matrix_has_no_error_bound(seed, steps):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    spectrum = np.abs(rng.normal(size=N)) + 0.1
    spectrum[:8] *= -1
    A = (Q * spectrum) @ Q.T
    b = Q[:, :8] @ rng.normal(size=8)  # only directions of negative curvature
    answer = run(A, b, np.full(N, 0.1), 1e-8, steps)
    assert answer.curvature < 0
    assert answer.error == answer.first_error == jnp.inf
    assert not answer.converged


@pytest.mark.parametrize("factor", [1.5, 2.0, 10.0, 100.0])
@pytest.mark.parametrize("log_condition", [1.0, 3.0, 6.0])
def test_a_lower_bound_that_is_too_large_is_noticed(factor, log_condition):
    """The sign of the Radau weights tells: in each of 10 systems solved to 1e-4."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
        A = (Q * 10 ** np.linspace(0, log_condition, N)) @ Q.T
        A = 0.5 * (A + A.T)
        b = rng.normal(size=N)
        answer = run(A, b, np.full(N, factor), 1e-4 * np.linalg.norm(b) / np.sqrt(factor))
        assert answer.curvature < 0.99


@settings(max_examples=30)
@given(seed=SEEDS, log_condition=st.sampled_from([6.0, 9.0, 12.0]))
def test_the_softest_direction_does_not_contradict_its_own_eigenvalue(seed, log_condition):
    """p'Ap of the softest direction is rounded by eps |A| |p|^2: up to 2e-4 of itself here."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    A = (Q * 10 ** np.linspace(0, log_condition, N)) @ Q.T
    A = 0.5 * (A + A.T)
    answer = run(A, Q[:, 0].copy(), np.ones(N), 1e-9, 100)
    assert answer.curvature >= 0.99


@pytest.mark.parametrize("where", ["A", "b", "guess"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gets_an_infinite_bound(where, bad):
    rng = np.random.default_rng(6)
    A, b, guess = spd(rng, N, 1.0), rng.normal(size=N), rng.normal(size=N)
    d = np.full(N, 0.9 * np.linalg.eigvalsh(A)[0])
    if where == "A":
        A[3, 3] = bad
    else:
        (b if where == "b" else guess)[3] = bad
    answer = run(A, b, d, 1e-3, guess=guess)
    assert answer.error == jnp.inf
    assert not answer.converged


def test_without_quadrature_the_residual_alone_decides():
    rng = np.random.default_rng(7)
    A = spd(rng, N, 2.0)
    b, d = rng.normal(size=N), np.full(N, 0.1 * np.linalg.eigvalsh(A)[0])
    cg = CG(quadrature=False)
    answer = cg(
        lambda v: A @ v,
        jnp.asarray(b),
        lower_bound=jnp.asarray(d),
        tolerance=1e-3,
        exact_residual=False,
    )
    dual = np.linalg.norm(np.asarray(answer.residual) / np.sqrt(d))
    assert answer.converged
    np.testing.assert_allclose(answer.error, dual + answer.rounding, rtol=1e-12)
    with_quadrature = run(A, b, d, 1e-3, exact=False)
    assert with_quadrature.iterations <= answer.iterations


def test_a_batch_equals_its_members():
    rng = np.random.default_rng(8)
    A = np.stack([spd(rng, N, k) for k in (0.0, 2.0, 4.0)])
    b = rng.normal(size=(3, N))
    b[0] = 0
    d = np.stack([np.full(N, 0.5 * np.linalg.eigvalsh(a)[0]) for a in A])
    tolerance = jnp.array([1e-3, 1e-8, 1e-2])

    def one(A, b, d, tolerance):
        return CG()(lambda v: A @ v, b, lower_bound=d, tolerance=tolerance)

    batch = jax.vmap(one)(jnp.asarray(A), jnp.asarray(b), jnp.asarray(d), tolerance)
    for i in range(3):
        single = run(A[i], b[i], d[i], tolerance[i], exact=False)
        # Sums are rounded otherwise in a batch, so the last step may be one more or less.
        assert abs(batch.iterations[i] - single.iterations) <= 1
        assert batch.converged[i]
        assert single.converged
        error = np.asarray(batch.x[i] - single.x)
        assert energy(A[i], error) <= batch.error[i] + single.error


def operator(rng, A):
    """A preconditioner that is no diagonal: exact, off by a factor of 100, or unrelated."""
    kind = rng.integers(3)
    if kind == 2:
        return spd(rng, N, 2.0)
    values, Q = np.linalg.eigh(A)
    values = np.maximum(values, 1e-15 * values[-1])
    return (Q / (values * (10 ** rng.uniform(-2, 2, size=N) if kind else 1))) @ Q.T


@eqx.filter_jit
def solve_by_operator(A, b, d, tolerance, steps, guess, inverse, exact):
    cg = eqx.tree_at(lambda cg: cg.max_steps, CG(), steps)
    return cg(
        lambda v: A @ v,
        b,
        lower_bound=d,
        tolerance=tolerance,
        guess=guess,
        preconditioner=lambda r: inverse @ r,
        exact_residual=exact,
    )


@settings(max_examples=40)
@given(
    seed=SEEDS,
    log_condition=st.sampled_from([0.0, 1.0, 3.0, 6.0, 9.0]),
    looseness=st.sampled_from([1 - 1e-6, 0.5, 1e-4]),
    exact=st.booleans(),
)
def test_bounds_hold_with_any_operator(seed, log_condition, looseness, exact):
    rng = np.random.default_rng(seed)
    A = spd(rng, N, log_condition)
    d = lower_bound(rng, A, looseness)
    inverse = operator(rng, A)
    b = rng.normal(size=N) if rng.random() < 0.5 else A @ rng.normal(size=N)
    guess = rng.normal(size=N) * rng.choice([0.0, 1.0])
    x = np.linalg.solve(A, b)
    x = x + np.linalg.solve(A, b - A @ x)
    first = energy(A, guess - x)
    # What rounding may do is judged by the products met, and those with a good P are small ones.
    size = np.finfo(float).eps * np.linalg.norm(A, 2) * (np.linalg.norm(x) + np.linalg.norm(guess))
    rounding = 4 * size / np.sqrt(np.min(d))
    for steps in (0, 1, 2, 4, 8, 16, N, 2 * N, 200):
        answer = solve_by_operator(A, b, d, 0.0, jnp.asarray(steps), guess, inverse, exact)
        if jnp.isfinite(answer.error):
            assert energy(A, np.asarray(answer.x) - x) <= answer.error + rounding
            assert first <= answer.first_error * (1 + 1e-12) + rounding
        else:  # the inverse of an ill-conditioned matrix may be rounded to an indefinite one
            assert log_condition > 6
        assert answer.curvature >= 0.98


def test_the_inverse_itself_takes_one_step():
    rng = np.random.default_rng(8)
    A, b = spd(rng, N, 4.0), rng.normal(size=N)
    d = np.full(N, 0.9 * np.linalg.eigvalsh(A)[0])
    tolerance = 1e-6 * np.linalg.norm(b) / np.sqrt(d[0])
    zero, steps = np.zeros(N), jnp.asarray(100)
    answer = solve_by_operator(A, b, d, tolerance, steps, zero, np.linalg.inv(A), False)
    assert answer.converged
    assert answer.iterations == 1
    assert run(A, b, d, tolerance, exact=False).iterations > 5


@pytest.mark.parametrize("softest", [-1.0, -1e-3])
def test_an_operator_that_is_not_definite_has_no_error_bound(softest):
    rng = np.random.default_rng(9)
    A, b = spd(rng, N, 1.0), rng.normal(size=N)
    values = np.full(N, -1.0 if softest == -1 else 1.0)
    # A single direction of the wrong sign, of which the right-hand side is made.
    values[0] = softest
    b = b if softest == -1 else np.eye(N)[0]
    d = np.full(N, 0.9 * np.linalg.eigvalsh(A)[0])
    answer = solve_by_operator(A, b, d, 1e-3, jnp.asarray(50), np.zeros(N), np.diag(values), False)
    assert answer.error == answer.first_error == jnp.inf
    assert not answer.converged


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_lower_bound_that_is_too_large_is_noticed_without_ritz_values(factor):
    """By the quotient of the solution, which leans to the smallest eigenvalue."""
    rng = np.random.default_rng(10)
    for _ in range(10):
        Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
        A = (Q * 10 ** np.linspace(0, 3, N)) @ Q.T
        A = 0.5 * (A + A.T)
        b = rng.normal(size=N)
        tolerance = 1e-4 * np.linalg.norm(b) / np.sqrt(factor)
        d, zero = np.full(N, factor), np.zeros(N)
        inverse = np.linalg.inv(A + np.eye(N))
        answer = solve_by_operator(A, b, d, tolerance, jnp.asarray(99), zero, inverse, True)
        assert answer.curvature < 0.99
