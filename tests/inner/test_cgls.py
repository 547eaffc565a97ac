"""Truncated conjugate gradients: beside the minimum in a ball, and what they say of spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner.cgls import Model, truncated
from tolerax.inner.trust_region import in_ball

N = 12


def problem(seed, bent=0.0):
    """A model with singular values from 1 to 0.01, and second derivatives of either sign; g, A."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(size, N)))[0] for size in (20, N))
    J, r, w = jnp.asarray(U * np.geomspace(1, 0.01, N) @ V.T), rng.normal(size=20), jnp.ones(N)
    S = rng.normal(size=(N, N))
    S, ridge = jnp.asarray(bent * (S + S.T)), jnp.asarray(1e-4)
    g = J.T @ r + ridge * w
    model = Model(
        push=lambda d: J @ d,
        pull=lambda v: J.T @ v,
        bend=(lambda d: S @ d) if bent else None,
        r=jnp.asarray(r),
        w=w,
        gradient=g,
        ridge=ridge,
        scale=jnp.asarray(rng.uniform(0.5, 2.0, N)),
        free=jnp.ones(N, bool),
    )
    return model, g, J.T @ J + ridge * jnp.eye(N) + S


def solved(model, radius, tolerance=1e-12, relative=0.0):
    options = {"tolerance": jnp.asarray(tolerance), "relative": relative}
    options |= {"inverse": jnp.asarray(0.0), "most": 100}
    return jax.jit(lambda radius: truncated(model, radius, **options))(jnp.asarray(radius))


@pytest.mark.parametrize("bent", [0.0, 0.05])
@pytest.mark.parametrize("radius", [0.1, 1.0, 10.0])
def test_half_of_what_the_ball_has_to_give(radius, bent):
    """Yuan (2000) proves the half for convex models; with negative curvature the step ends at the
    boundary, where it has at least what the gradient gives."""
    for seed in range(3):
        model, g, A = problem(seed, bent)
        found = solved(model, radius)
        root = jnp.sqrt(model.scale)
        best = in_ball(g / root, A / (root[:, None] * root[None]), jnp.asarray(radius)) / root
        fall = lambda p, g=g, A=A: -float(g @ p + 0.5 * p @ (A @ p))  # noqa: E731
        assert float(model.length(found.p)) <= radius * (1 + 1e-12)
        assert float(found.gone) == pytest.approx(2 * fall(found.p), rel=1e-9)
        if not bent:
            assert fall(found.p) >= 0.5 * fall(best)
        else:
            assert np.linalg.eigvalsh(A)[0] < 0
            assert float(model.length(found.p)) == pytest.approx(radius, rel=1e-9)
            t = radius / float(model.length(g / model.scale))
            along = max(fall(-s * t * g / model.scale) for s in (0.1, 0.5, 1.0))
            assert fall(found.p) >= along * (1 - 1e-12)


def test_the_spectrum_is_seen_and_the_rest_bounded():
    for seed in range(3):
        model, g, A = problem(seed)
        root = np.sqrt(model.scale)
        values = np.linalg.eigvalsh(A / (root[:, None] * root[None]))
        whole = float(g @ jnp.linalg.solve(A, g))
        for relative in (0.5, 0.1, 1e-3):
            found = solved(model, np.inf, relative=relative)
            assert float(found.gone) <= whole <= float(found.gone + found.left) * (1 + 1e-9)
            assert float(found.ritz.largest) <= values[-1] * (1 + 1e-9)
            assert 1 / float(found.ritz.inverse) >= values[0] * (1 - 1e-9)
        # After all N steps both ends are known.
        assert 1 / float(found.ritz.inverse) <= 2 * values[0]
        assert float(found.ritz.largest) >= 0.3 * values[-1]
