"""Distances from residuals against explicit functions with known minimizers.

With e = y - y* and G the mean Hessian over the segment, grad h(y) = G e. Self-concordance gives
exp(-M s|e|) H <= H(y - s e) <= exp(M s|e|) H for H = H(y), hence shrink(M|e|) H <= G and
-excess(M|e|) H <= G - H <= excess(M|e|) H. From e'G e = e'grad h(y): |e|_H shrink(M|e|) is at most
the Newton decrement, and |e|_D at most |grad h(y)|_{D^-1}.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner.functions import LONG, cases, distances, minimizer
from tolerax.inner.bounds import (
    at_least,
    decrement_for,
    distance,
    dual_norm,
    dual_norm_given,
    excess,
    growth,
    shrink,
)

# Rounding of the scalar functions, a few eps and what cancels in exp(a) - 1 - a.
CLOSE = 1e-12
EXPONENTS = np.concatenate([[0.0], 10.0 ** np.arange(-12, 2.51, 0.05)])


def exact(a):
    """shrink, growth and excess by series where long double would cancel."""
    a = LONG(a)
    if a == 0:
        return LONG(1), LONG(1), LONG(0)
    if a < 1:
        terms = [a**k / LONG(np.prod(np.arange(1, k + 2, dtype=LONG))) for k in range(1, 30)]
        grown = 1 + sum(terms)
        return grown * np.exp(-a), grown, sum(terms)
    return -np.expm1(-a) / a, np.expm1(a) / a, (np.expm1(a) - a) / a


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_mean_hessians_are_bounded_on_the_safe_side_and_sharply(dtype):
    slack = CLOSE if dtype == np.float64 else 1e-4
    for a in EXPONENTS.astype(dtype):
        if a > 80 and dtype == np.float32:
            continue
        low, grown, over = exact(a)
        x = jnp.asarray(a)
        lower, upper, more = float(shrink(x)), float(growth(x)), float(excess(x))
        assert low * (1 - slack - 1e-6 * a) <= lower <= low * (1 + slack)
        assert grown * (1 - slack) <= upper <= grown * (1 + 1e-6 * a + slack)
        assert over * (1 - slack) <= more <= over * (1 + 1e-5 + slack)
        assert float(at_least(jnp.asarray(over, dtype))) <= a * (1 + slack)


def test_mean_hessians_are_monotone():
    a = jnp.asarray(EXPONENTS)
    for function, sign in ((shrink, -1), (growth, 1), (excess, 1), (at_least, 1)):
        steps = sign * np.diff(jax.vmap(function)(a))
        # Where two branches meet the safe side may step back by the room it leaves.
        assert (steps >= -1e-5 * np.asarray(a[:-1])).all()


def test_there_is_no_bound_at_infinity():
    inf = jnp.array(jnp.inf)
    assert shrink(inf) == 0
    assert growth(inf) == excess(inf) == at_least(inf) == jnp.inf
    t, a = distance(inf, inf, jnp.ones(2), jnp.array(1.0))
    assert t == a == jnp.inf
    t, a = distance(inf, inf, jnp.ones(2), jnp.array(0.0))
    assert t == jnp.inf
    assert a == 0


sharpened = jax.jit(dual_norm_given)


@jax.jit
def bounds(decrement, r, d, m):
    return distance(decrement, dual_norm(r, d), d, m)


RNG = np.random.default_rng(0)
CASES = cases(RNG)


@functools.cache
def solution_of(which):
    return minimizer(CASES[which].h, len(CASES[which].d))


@pytest.mark.parametrize("which", range(len(CASES)), ids=[case.name for case in CASES])
def test_distances_hold_near_and_far(which):
    case, solution = CASES[which], solution_of(which)
    rng = np.random.default_rng(which)
    n = len(case.d)
    ratios = []
    for size, _ in itertools.product(10.0 ** np.arange(-6.0, 4), range(3)):
        direction = rng.normal(size=n) / (np.sqrt(case.d) if rng.random() < 0.5 else 1)
        y = solution.astype(float) + size * direction / np.linalg.norm(direction)
        energy, euclidean, r, decrement = distances(case, y, solution)
        # The decrement itself is rounded: by 1e-12 of the gradient over the softest direction.
        allowed = decrement + 1e-12 * np.linalg.norm(r / np.sqrt(case.d))
        t, a = bounds(allowed, r, jnp.asarray(case.d), case.m)
        assert energy <= t
        assert case.m * euclidean <= a * (1 + 1e-9)
        if case.m * energy / np.sqrt(case.d.min()) < 0.1:
            ratios.append(float(t) / energy)
        # The strong convexity alone, as for solvers without a Newton step.
        t, a = bounds(np.inf, r, jnp.asarray(case.d), case.m)
        assert energy <= t
        assert case.m * euclidean <= a * (1 + 1e-9)
    # Near the solution the bound is the decrement, up to a term of third order.
    assert case.m == 0 or not ratios or max(ratios) <= 1.2


def test_a_bump_of_curvature_far_from_the_minimizer():
    """h'' = mu + exp(-M |y|) obeys |h'''| <= M h''. With the minimizer at -L and mu L << 1 the
    gradient at 0 is about 1/M, the curvature there 1, and |e|_H = L >> 1/M: the decrement says
    nothing about the distance, and no constant factor on it would."""
    for m, length, mu in itertools.product([0.1, 1.0, 10.0], [1e2, 1e4], [1e-6, 1e-8]):
        r = mu * length - np.expm1(-m * length) / m
        t, a = bounds(
            jnp.array(abs(r) / np.sqrt(1 + mu)), jnp.array([r]), jnp.array([mu]), jnp.array(m)
        )
        assert np.sqrt(1 + mu) * length <= t
        assert m * length <= a


def test_the_exponential_attains_the_self_concordance():
    """h = exp(y) - c y + mu y^2/2 with M = 1: the bound is close to sharp on the steep side."""
    mu = 1e-3
    for c in (1.5, 4.0, 50.0):
        y = 0.0
        for _ in range(100):
            y -= (np.exp(y) - c + mu * y) / (np.exp(y) + mu)
        for e in (1e-3, 0.1, 1.0, 5.0):
            for sign in (-1, 1):
                at = y + sign * e
                H = np.exp(at) + mu
                r = np.exp(at) - c + mu * at
                t, _ = bounds(
                    jnp.array(abs(r) / np.sqrt(H)),
                    jnp.array([r]),
                    jnp.array([mu]),
                    jnp.array(1.0),
                )
                assert e * np.sqrt(H) <= t * (1 + 1e-9)


@given(
    tolerance=st.floats(1e-12, 1e3),
    m=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    d=st.floats(1e-10, 1e2),
)
def test_the_decrement_asked_for_is_enough(tolerance, m, d):
    """decrement_for inverts the local bound as long as that can be solved (ratio < 0.999)."""
    diagonal = jnp.array([d, 2 * d])
    wanted = decrement_for(jnp.array(tolerance), diagonal, jnp.array(m))
    assert 0 < wanted <= tolerance
    t, _ = distance(wanted, jnp.array(1e300), diagonal, jnp.array(m))
    if m * tolerance / np.sqrt(d) < 6:
        np.testing.assert_allclose(t, tolerance, rtol=1e-5)


def test_distances_grow_with_everything_they_depend_on():
    d = jnp.array([1e-2, 1.0])
    reference = distance(jnp.array(1e-2), jnp.array(1e-1), d, jnp.array(1.0))
    for decrement, r_dual, m in ((2e-2, 1e-1, 1.0), (1e-2, 2e-1, 1.0), (1e-2, 1e-1, 2.0)):
        more = distance(jnp.array(decrement), jnp.array(r_dual), d, jnp.array(m))
        assert more[0] >= reference[0]
        assert more[1] >= reference[1]


def test_an_infinite_tolerance_asks_for_nothing():
    d = jnp.array([0.25])
    assert decrement_for(jnp.array(jnp.inf), d, jnp.array(0.0)) == jnp.inf
    # With M > 0 the local bound exists below sqrt(min D)/M.
    np.testing.assert_allclose(decrement_for(jnp.array(jnp.inf), d, jnp.array(2.0)), 0.25)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_products_sharpen_the_dual_norm_as_far_as_they_can(seed):
    rng = np.random.default_rng(seed)
    n, d = 8, 10 ** rng.uniform(-2, 2, 8)
    root = np.sqrt(d)[:, None] * rng.normal(size=(n, 4)) * 10 ** rng.uniform(-1, 2)
    A, r = np.diag(d) + root @ root.T, rng.normal(size=n)
    p = np.zeros((4, n))  # with a row that was not used
    p[:3] = rng.normal(size=(3, n)) / np.sqrt(d)
    ap = p @ A
    found = float(sharpened(jnp.asarray(r), jnp.asarray(d), jnp.asarray(p), jnp.asarray(ap)))
    # The smallest matrix above D that has these products, by dense algebra.
    u = (ap - p * d)[:3].T
    M = np.diag(d) + u @ np.linalg.solve(p[:3] @ u, u.T)
    best = np.sqrt(r @ np.linalg.solve(M, r))
    simple = float(dual_norm(jnp.asarray(r), jnp.asarray(d)))
    # 1e-7 of P'U is given away against rounding.
    assert np.sqrt(r @ np.linalg.solve(A, r)) <= found * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found <= min(best * 1.01, simple * (1 + 1e-12))
    # One product with the solution itself tells all, down to a thousandth of the simple bound.
    e = np.linalg.solve(A, r)[None]
    known = float(sharpened(jnp.asarray(r), jnp.asarray(d), jnp.asarray(e), jnp.asarray(e @ A)))
    np.testing.assert_allclose(known, np.sqrt(r @ e[0]), rtol=0.01)
