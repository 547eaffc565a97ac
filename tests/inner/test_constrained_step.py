"""Steps that minimize a quadratic under quadratic constraints, beside closed forms and SLSQP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tolerax.inner.constrained_step import constrained_step
from tolerax.inner.interpolation import Quadratic

STEP = jax.jit(constrained_step)
FAR = jnp.full(2, 10.0)


def linear(c, *g):
    """Rows without curvature."""
    g = jnp.array(g, float)
    return Quadratic(jnp.array(c, float), g, jnp.zeros((*g.shape, g.shape[-1])))


def one(g, H):
    return Quadratic(jnp.array(0.0), jnp.array(g, float), jnp.array(H, float))


@pytest.mark.parametrize(
    ("lower", "upper", "expected", "multiplier"),
    [
        # The nearest point of x + y = 0.5 to (1, 0.2): the gradient there is -0.35 (1, 1).
        (-jnp.inf, 0.5, [0.65, -0.15], 0.35),
        (0.5, 0.5, [0.65, -0.15], 0.35),
        # From the other side (1, 0.2) is too far: the step ends on the ball, on its way there.
        (0.5, jnp.inf, [1 / 1.04**0.5, 0.2 / 1.04**0.5], 0.0),
        # x + y >= 1.3: on the line, within the ball, nearest to (1, 0.2).
        (1.3, jnp.inf, [0.65 + 0.155**0.5 / 2**0.5, 0.65 - 0.155**0.5 / 2**0.5], None),
    ],
)
def test_a_line_in_a_ball(lower, upper, expected, multiplier):
    f = one([-1.0, -0.2], np.eye(2))
    rows = linear([0.0], [1.0, 1.0])
    step = STEP(f, rows, jnp.array([lower]), jnp.array([upper]), -FAR, FAR, jnp.zeros(1))
    assert bool(step.found)
    np.testing.assert_allclose(step.s, expected, atol=1e-8)
    if multiplier is not None:
        np.testing.assert_allclose(step.multipliers, [multiplier], atol=1e-8)


def test_a_side_of_the_box_and_a_curved_row():
    # Lowest x on the circle of radius 0.8 around (0.3, 0), in a box that ends at x = -0.25.
    f = one([1.0, 0.0], np.zeros((2, 2)))
    circle = Quadratic(
        jnp.array([0.09 - 0.64]), jnp.array([[-0.6, 0.0]]), jnp.array([2 * np.eye(2)])
    )
    low = jnp.array([-0.25, -1.0])
    step = STEP(f, circle, jnp.zeros(1), jnp.zeros(1), low, FAR, jnp.array([0.1]))
    assert bool(step.found)
    np.testing.assert_allclose(step.s[0], -0.25, atol=1e-9)
    np.testing.assert_allclose(abs(step.s[1]), (0.64 - 0.55**2) ** 0.5, atol=1e-8)


def test_rows_that_contradict_each_other_are_met_halfway():
    f = one([0.1, 0.0], np.eye(2))
    rows = linear([0.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    lower, upper = jnp.array([0.2, -jnp.inf]), jnp.array([jnp.inf, -0.4])
    step = STEP(f, rows, lower, upper, -FAR, FAR, jnp.zeros(2))
    assert not bool(step.found)
    # Between 0.2 and -0.4; what the objective adds falls with the weight, which ends at 1e8.
    np.testing.assert_allclose(step.s, [-0.1, 0.0], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_convex_problems_beside_slsqp(seed):
    rng = np.random.default_rng(seed)
    n, p = 4, 2
    root = rng.normal(size=(n, n))
    g, H = rng.normal(size=n), root @ root.T
    a = rng.normal(size=(p, n))
    bent = np.array([r @ r.T for r in 0.5 * rng.normal(size=(p, n, n))])
    c = -rng.uniform(0, 0.5, size=p)  # 0 is feasible
    low, high = -rng.uniform(0.1, 1, size=n), rng.uniform(0.1, 1, size=n)
    step = STEP(
        one(g, H),
        Quadratic(jnp.array(c), jnp.array(a), jnp.array(bent)),
        jnp.full(p, -jnp.inf),
        jnp.zeros(p),
        jnp.array(low),
        jnp.array(high),
        jnp.zeros(p),
    )

    def f(s):
        return g @ s + 0.5 * s @ H @ s

    def rows(s):
        return np.append(-(c + a @ s + 0.5 * (bent @ s) @ s), 1 - s @ s)

    peer = minimize(
        f,
        np.zeros(n),
        jac=lambda s: g + H @ s,
        method="SLSQP",
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "ineq", "fun": rows},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    s = np.asarray(step.s)
    assert rows(s).min() >= -1e-8
    assert (s >= low).all()
    assert (s <= high).all()
    assert f(s) <= peer.fun + 1e-6 * (1 + abs(peer.fun))
