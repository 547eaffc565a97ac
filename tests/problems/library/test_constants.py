"""Every constant that the ready-made problems claim, against dense algebra and adversarial search.

Rounding: the claims are compared with eigenvalues and singular values of matrices of at most 640
rows, whose relative error is below 1e-10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from tests.problems.library.dense import Dense, true_cross_bounds, worst_third_derivative
from tolerax.problems import library

ROUNDING = 1e-9


@functools.cache
def dense(name: str) -> Dense:
    make = {
        "quadratic": lambda: library.quadratic(seed=3),
        "digits_penalties": lambda: library.digits_penalties(seed=3),
        "tv_denoising": lambda: library.tv_denoising(seed=3, size=8, pictures=1),
        "field_of_experts": lambda: library.field_of_experts(
            seed=3, size=8, pictures=1, filters=3, width=3
        ),
        "hyper_cleaning": lambda: library.hyper_cleaning(seed=3),
    }
    return Dense(make[name]())


def some_x(name: str, rng: np.random.Generator) -> np.ndarray:
    """Hyperparameters as a solver meets them: away from the start, unequal."""
    d = dense(name)
    if name == "digits_penalties":
        return -7 + 2 * rng.normal(size=640)
    if name == "tv_denoising":
        return np.array([rng.uniform(-7, 0), rng.uniform(-6, 0)])
    if name == "field_of_experts":
        x = dict(d.problem.x0)
        x["filters"] = x["filters"] + 0.3 * rng.normal(size=x["filters"].shape)
        x["log_weight"] = jnp.asarray(rng.uniform(-6, -1))
        x["log_weights"] = jnp.asarray(rng.normal(size=3))
        x["log_smoothings"] = jnp.asarray(rng.uniform(-5, -1, size=3))
        return np.asarray(ravel_pytree(x)[0])
    return d.x0 + 2 * rng.normal(size=d.x0.shape)


def steps(d: Dense, y: np.ndarray, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Displacements of all lengths, spread, in one entry, and to where everything is alike."""
    n = len(y)
    spread = [scale * rng.normal(size=n) for scale in (1e-4, 1e-2, 1.0)]
    single = [scale * np.eye(n)[rng.integers(n)] for scale in (1e-2, 0.1, 1.0)]
    alike = np.mean(y) - y
    return [e for e in (alike, *single, *spread) if np.any(e)][:count]


def check(
    d: Dense, y: np.ndarray, x: np.ndarray, rng: np.random.Generator, count: int = 7
) -> np.ndarray:
    """Strong convexity and cross bounds at (y, x); returns claims over truths."""
    H, D = np.asarray(d.hessian(y, x)), d.lower_bound(x)
    assert (D > 0).all()
    # H >= D is D^-1/2 H D^-1/2 >= I: the error of its eigenvalues is relative to the largest.
    scaled = np.linalg.eigvalsh(H / np.sqrt(np.outer(D, D)))
    assert scaled[0] >= 1 - 1e-13 * scaled[-1]

    q = np.linalg.solve(H, d.upper_gradient(y, x))
    claimed = d.cross_bounds(y, q, x)
    true = true_cross_bounds(d, H, y, q, x, steps(d, y, rng, count))
    assert (true <= claimed * (1 + ROUNDING)).all(), (true, claimed)
    return claimed / np.maximum(true, 1e-300)


NAMES = ["quadratic", "digits_penalties", "tv_denoising", "field_of_experts", "hyper_cleaning"]
# How far the claims (adjoint, state) may lie above the truth at a lower-level solution.
LOOSENESS = {
    "quadratic": (1 + 1e-9, 1),
    "digits_penalties": (1.5, 1.5),
    "tv_denoising": (1.5, 2),
    "field_of_experts": (4, 5),
    "hyper_cleaning": (10, 4),
}


@pytest.mark.parametrize("name", NAMES)
def test_strong_convexity_and_cross_bounds_at_a_lower_solution(name):
    rng = np.random.default_rng(0)
    d = dense(name)
    x = d.x0 if name in ("digits_penalties", "hyper_cleaning") else some_x(name, rng)
    looseness = check(d, d.solution(x), x, rng, count=2)
    assert (looseness[:2] <= LOOSENESS[name]).all()


@pytest.mark.parametrize("name", ["digits_penalties", "hyper_cleaning"])
def test_strong_convexity_and_cross_bounds_at_random_weights(name):
    rng = np.random.default_rng(1)
    d = dense(name)
    x, y = some_x(name, rng), 2 * rng.normal(size=640)
    check(d, y, x, rng, count=2)


@pytest.mark.parametrize("name", ["tv_denoising", "field_of_experts"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_strong_convexity_and_cross_bounds_at_random_pictures(name, seed, scale):
    rng = np.random.default_rng(seed)
    d = dense(name)
    x = some_x(name, rng)
    # Scale 0 is a flat picture, where the direction of its gradient is not defined.
    y = 0.5 + scale * rng.normal(size=d.y0.shape)
    check(d, y, x, rng)


def test_relative_smoothness_of_the_quadratic_is_the_largest_eigenvalue():
    d = dense("quadratic")
    H, G = d.hessian(d.y0, d.x0), d.upper_hessian(d.y0, d.x0)
    true = scipy.linalg.eigh(G, H, eigvals_only=True)[-1]
    assert true <= d.claimed("relative_smoothness", d.x0) * (1 + ROUNDING) <= true * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("digits_penalties", 0.3),
        ("hyper_cleaning", 0.05),
        ("tv_denoising", 0.1),
        ("field_of_experts", 0.01),
    ],
)
def test_self_concordance_along_a_direction(name, reached):
    """The largest |D³ lower[u, u, v]| / D² lower[u, u] over u is an eigenvalue for each y and v.
    One sharp v must come within the factor `reached`: of random ones few are."""
    rng = np.random.default_rng(6)
    d = dense(name)
    x = d.x0 - 3 if name == "digits_penalties" else some_x(name, rng)
    nu = 3 / d.claimed("self_concordance", x)
    digits = isinstance(d.problem, library.DigitsPenalties | library.HyperCleaning)
    best = 0.0
    for scale in (0.3, 1.0):
        y = (
            scale * rng.normal(size=640)
            if digits
            else 0.5 + nu * scale * rng.normal(size=d.y0.size)
        )
        H = np.asarray(d.hessian(y, x))
        for v in (np.eye(len(y))[rng.integers(len(y))], rng.normal(size=len(y)), y - d.y0):
            values = scipy.linalg.eigh(d.hessian_change(v, y, x), H, eigvals_only=True)
            true, claimed = np.max(np.abs(values)), d.claimed_along(v, x)
            assert true <= claimed * (1 + ROUNDING)
            assert claimed <= d.claimed("self_concordance", x) * np.linalg.norm(v) * (1 + ROUNDING)
            best = max(best, true / claimed if claimed > 0 else 0.0)  # a pixel may be always 0
    assert best >= reached


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits_penalties"])
def test_upper_smoothness(name):
    rng = np.random.default_rng(2)
    d = dense(name)
    claimed = d.claimed("upper_smoothness", d.x0)
    start = np.linalg.eigvalsh(d.upper_hessian(np.zeros_like(d.y0), d.x0))[-1]
    other = np.linalg.eigvalsh(d.upper_hessian(rng.normal(size=d.y0.shape), d.x0))[-1]
    assert max(start, other) <= claimed * (1 + ROUNDING)
    # Softmax of zero weights has diag p - pp' = (I - 11'/10)/10, a fifth of the bound.
    assert claimed <= start * (5.001 if name == "hyper_cleaning" else 1.0001)


def test_a_quadratic_has_no_third_derivative():
    d = dense("quadratic")
    assert d.claimed("self_concordance", d.x0) == 0
    y = np.random.default_rng(0).normal(size=d.y0.shape)
    np.testing.assert_array_equal(d.hessian(y, d.x0), d.hessian(d.y0, d.x0))


@pytest.mark.parametrize("name", ["digits_penalties", "hyper_cleaning"])
def test_self_concordance_of_the_digits_against_ascent(name):
    rng = np.random.default_rng(4)
    d = dense(name)
    claimed = d.claimed("self_concordance", d.x0)
    # A sample of almost the largest norm, two classes of which compete far from the boundary.
    assert isinstance(d.problem, library.DigitsPenalties | library.HyperCleaning)
    a = d.problem.data.train.features
    i = int(jnp.argmax(jnp.sum(a**2, axis=1)))
    contrast = np.outer(a[i], np.eye(10)[0] - np.eye(10)[1]).ravel()
    starts = [
        (rng.normal(size=640), rng.normal(size=640)),
        (contrast, contrast / float(a[i] @ a[i])),
    ]
    # Penalties damp the ratio: leave them out.
    x = d.x0 - 20 if name == "digits_penalties" else d.x0
    found = worst_third_derivative(d, x, starts, steps=60)
    assert 0.3 * claimed <= found <= claimed * (1 + ROUNDING)


@pytest.mark.parametrize(("name", "reached"), [("tv_denoising", 0.6), ("field_of_experts", 0.5)])
def test_self_concordance_of_the_denoisers_against_ascent(name, reached):
    rng = np.random.default_rng(5)
    d = dense(name)
    best = 0.0
    for x in (d.x0, some_x(name, rng)):
        claimed = d.claimed("self_concordance", x)
        # The constant scales as 1/ν: so do the differences at which it is attained.
        nu = 3 / claimed
        starts = [
            (np.eye(len(d.y0))[k], 0.5 + nu * scale * rng.normal(size=d.y0.shape))
            for k in rng.integers(len(d.y0), size=2)
            for scale in (0.3, 1.0)
        ]
        found = worst_third_derivative(d, x, starts, steps=80)
        assert found <= claimed * (1 + ROUNDING)
        best = max(best, found / claimed)
    assert best >= reached


def test_constant_of_the_smoothed_length_in_the_plane():
    """sup |D³φ[u, u, b]|/(|b| D²φ[u, u]) = 3/2 for φ(v) = √(|v|² + 1): never more, and attained."""

    def phi(v):
        return jnp.sqrt(jnp.sum(v**2) + 1)

    def ratio(v, u):
        def curvature(v):
            return u @ jax.hessian(phi)(v) @ u

        return jnp.linalg.norm(jax.grad(curvature)(v)) / curvature(v)

    rng = np.random.default_rng(0)
    v = rng.normal(size=(2000, 2)) * np.exp(rng.normal(size=(2000, 1)))
    angle = rng.uniform(0, 2 * np.pi, size=2000)
    u = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ratios = jax.jit(jax.vmap(ratio))(v, u)
    assert 1.4 <= float(jnp.max(ratios)) <= 1.5 * (1 + ROUNDING)
    at = jnp.array([1.0, 0.0])
    np.testing.assert_allclose(ratio(at, at), 1.5, rtol=1e-12)
