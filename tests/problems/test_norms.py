"""The formulas that turn residuals into errors of value and gradient, one by one.

With e = y - y*, G the mean lower-level Hessian between them, s = grad J - H q, H* = H(y*):

    J(y) - q'r - f = (s + H q)'e - R - q'G e,       |R| <= A t^2 / 2
    H*(q - q*) = (H* - H) q + (grad J(y) - grad J(y*)) - s
    z - grad phi = [change of grad_x J - F_x' q from y* to y] + F_x(y*)'(q* - q)

and D^3 h[e, q, w] <= M min(|e|_2 |q|_H, |q|_2 |e|_H) |w|_H, as |D^3 h[u, u, v]| <= M |v|_2 u'Hu
bounds the bilinear form D^3 h[., ., v] by M |v|_2 H. H(y - s e) <= exp(M s|e|) H gives the factors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems.truth import MAKE, exact, some_x
from tolerax.problems.norms import CrossBounds, energy_errors

NAMES = list(MAKE)
SIZES = [1e-6, 1e-3, 0.1, 1.0]


bounds = jax.jit(energy_errors)


def norm(H, v):
    return float(np.sqrt(v @ H @ v))


def measured(name, x, y, q, truth):
    """The bounds from exact sizes of what is wrong; the cross bounds are the problem's own."""
    d = exact(name)
    H, r = np.asarray(d.hessian(y, x)), np.asarray(d.gradient(y, x))
    e, m = y - truth.y, d.claimed("self_concordance", x)
    g = np.asarray(d.upper_gradient(y, x))
    s = g - H @ q
    cross = d.claims(y, q, x)
    smoothness = d.claimed("upper_smoothness", d.x0) / np.linalg.eigvalsh(H)[0]
    given = {
        "distance": norm(H, e),
        "exponent": m * np.linalg.norm(e),
        "adjoint_error": np.sqrt(s @ np.linalg.solve(H, s)),
        "q_norm": norm(H, q),
        "q_bend": m * np.linalg.norm(q),
        "smoothness": smoothness,
    }
    bound = bounds(**{k: jnp.asarray(v) for k, v in given.items()}, cross=cross)
    value = abs(float(d.upper(y, x)) - q @ r - truth.value)
    gradient = np.linalg.norm(np.asarray(d.total(y, q, x)) - truth.gradient)
    return bound, value, gradient


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_bounds_hold_for_any_state_and_adjoint(name, seed):
    rng = np.random.default_rng(seed)
    d = exact(name)
    x = some_x(name, rng)
    truth = d.at(x)
    H = np.asarray(d.hessian(truth.y, x))
    values, vectors = np.linalg.eigh(H)
    m = max(d.claimed("self_concordance", x), 1e-3)
    for size in SIZES:
        # Errors of that size in the energy norm, spread alike or along the softest direction.
        def error(size=size):
            spread = rng.normal(size=len(values)) / np.sqrt(values)
            soft = vectors[:, 0] / np.sqrt(values[0])
            return size * (soft if rng.random() < 0.3 else spread / np.sqrt(len(values)))

        y = truth.y + error() * min(1.0, np.sqrt(values[0]) / m)
        q = truth.q + error() * (1 + norm(H, truth.q))
        bound, value, gradient = measured(name, x, y, q, truth)
        # The truth itself is rounded.
        assert value <= bound.value * (1 + 1e-9) + 1e-13 * (1 + abs(truth.value))
        total = bound.from_state + bound.from_adjoint
        assert gradient <= total * (1 + 1e-9) + 1e-12 * (1 + np.linalg.norm(truth.gradient))


@pytest.mark.parametrize("name", NAMES)
def test_the_value_is_of_second_order_and_the_gradient_of_first(name):
    """Exactly: both errors divided by ten divide the bounds by about 100 and 10."""
    rng = np.random.default_rng(1)
    d = exact(name)
    x = some_x(name, rng)
    truth = d.at(x)
    e = rng.normal(size=truth.y.shape) * 1e-3 / max(d.claimed("self_concordance", x), 1.0)
    p = rng.normal(size=truth.y.shape) * 1e-3
    found = [measured(name, x, truth.y + k * e, truth.q + k * p, truth)[0] for k in (1.0, 0.1)]
    assert 50 <= found[0].value / found[1].value <= 200
    assert 8 <= found[0].from_adjoint / found[1].from_adjoint <= 13
    if name != "quadratic":
        assert 8 <= found[0].from_state / found[1].from_state <= 13


def test_a_cross_derivative_that_changes_needs_its_third_bound():
    """h = (y - b)^2/2 - x sin y at x = 0, J = y: phi'(0) = cos b, and the oracle at y = 0, which is
    b away, says 1. H = 1, M = 1 is true (0 would be), q = 1, B1 = B12 = 1 and B2 = |sin 0| = 0:
    only B3 = 1, from |d2/dy2 cos y| <= 1, sees the difference."""
    b = 0.5
    one = jnp.ones(())
    given = {
        "distance": jnp.asarray(b),
        "exponent": 0 * one,
        "adjoint_error": 0 * one,
        "q_norm": one,
        "q_bend": 0 * one,
        "smoothness": 0 * one,
    }
    blind = energy_errors(**given, cross=CrossBounds(one, 0 * one, one))
    assert blind.from_state == 0
    given["exponent"], given["q_bend"] = jnp.asarray(b), one
    sees = energy_errors(**given, cross=CrossBounds(0 * one, 0 * one, 0 * one, third=one))
    assert 1 - np.cos(b) <= sees.from_state <= 2 * (1 - np.cos(b))


def test_without_a_bound_on_the_exponent_there_is_none_on_the_errors():
    one, inf = jnp.ones(()), jnp.array(jnp.inf)
    cross = CrossBounds(one, one, one)
    given = {"adjoint_error": one, "smoothness": one, "q_bend": one, "cross": cross}
    bound = energy_errors(distance=inf, exponent=inf, q_norm=one, **given)
    assert bound.value == bound.from_state == bound.from_adjoint == jnp.inf
    # An upper level without a slope has no adjoint to be wrong about.
    given = {"adjoint_error": 0 * one, "smoothness": 0 * one, "q_bend": 0 * one, "cross": cross}
    bound = energy_errors(distance=one, exponent=jnp.array(1e4), q_norm=0 * one, **given)
    assert bound.value == bound.from_adjoint == 0
    assert bound.from_state == 1
    # What is not a number is not taken for nothing.
    bound = energy_errors(distance=one, exponent=one, q_norm=jnp.array(jnp.nan), **given)
    assert jnp.isnan(bound.value)


@pytest.mark.parametrize("name", ["variation", "experts", "cleaning"])
def test_the_third_bounds_that_the_library_claims(name):
    """Against ascent over y, q, e and v from random starts and single pixels."""
    d = exact(name)
    rng = np.random.default_rng(0)

    def twice(y, q, e, v, x):
        part = lambda y: d.total(y, q, x)  # noqa: E731
        once = lambda y: jax.jvp(part, (y,), (e,))[1]  # noqa: E731
        return jax.jvp(once, (y,), (v,))[1]

    def negative(z, x):
        y, q, e, v = jnp.split(z, 4)
        energy = lambda w: jnp.sum(w * jax.jvp(lambda y: d.gradient(y, x), (y,), (w,))[1])  # noqa: E731
        size = jnp.log(energy(q)) + jnp.log(energy(e)) + jnp.log(jnp.sum(v**2))
        return 0.5 * (size - jnp.log(jnp.sum(twice(y, q, e, v, x) ** 2) + 1e-300))

    slope = jax.jit(jax.value_and_grad(negative))
    best = 0.0
    for _ in range(2):
        x = some_x(name, rng)
        truth = d.at(x)
        n, m = len(truth.y), d.claimed("self_concordance", x)
        starts = [rng.normal(size=(3, n)), np.eye(n)[rng.integers(n, size=3)] + 1e-3]
        for directions in starts:
            found = scipy.optimize.minimize(
                lambda z, x=x: tuple(np.asarray(part, float) for part in slope(z, x)),
                np.concatenate([truth.y, directions.ravel()]),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 40},
            )
            y = found.x[:n]
            claimed = d.claims(y, truth.q, x)
            ratio = np.exp(-found.fun) / m / float(claimed.third)
            assert ratio <= 1 + 1e-9
            best = max(best, ratio)
    assert best >= {"variation": 0.3, "experts": 0.005, "cleaning": 0.05}[name]
