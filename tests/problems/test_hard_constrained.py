"""Layers that obey an equation: against dense least squares and finite differences."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Boxes, Equation, HardConstrained
from tolerax.problems import BackwardReport, RandomAssignment, Router

G, N = 24, 4
X = np.linspace(0.0, 1.0, G)
SLOPE = np.gradient(np.eye(G), X[1], axis=0, edge_order=2)
BOXES = Boxes((G,), (3,))
BLENDED = Boxes((G,), (3,), overlap=2)
RATES = jnp.array([1.0, 2.0])


class Waves(eqx.Module):
    """Basis functions that vanish at 0."""

    steepness: jax.Array

    def __call__(self, inputs):
        return jnp.stack([jnp.exp(-k * jnp.asarray(X)) - 1 for k in self.steepness * inputs[0]])


NETWORK = Waves(jnp.array([0.5, 1.0, 1.7, 2.9]))


def channels(u):
    return jnp.stack([u, jnp.asarray(SLOPE) @ u])


def area(z, inputs):
    """The integral of u^2 is what the equation says of it, u' + rate u^2 = 0."""
    weights = jnp.ones(G).at[0].set(0.5).at[-1].set(0.5) / (G - 1)
    return (z[0, -1] - z[0, 0] + inputs[0] * weights @ z[0] ** 2)[None]


# u' + rate u + 0.3 = 0 where bend is 0, u' + rate u^2 = 0 where it is 1; one program for both.
EQUATION = Equation(
    channels,
    lambda z, data: z[1] + data[0] * z[0] * jnp.where(data[1] > 0, z[0], 1) + 0.3 * (1 - data[1]),
    data=lambda inputs: inputs,
    lift=lambda inputs: jnp.ones(G),
)
HELD = Equation(channels, EQUATION.residual, data=EQUATION.data, lift=EQUATION.lift, balance=area)
RIDGE = 1e-4  # keeps what rounding does to the coefficients below what the tests look at
NUMBERS = {"ridge": RIDGE, "tolerance": 1e-10}
LAYERS = {
    "alone": HardConstrained(NETWORK, EQUATION, BOXES, **NUMBERS),
    "tied": HardConstrained(NETWORK, EQUATION, BOXES, faces=5.0, **NUMBERS),
    "held": HardConstrained(NETWORK, HELD, BOXES, **NUMBERS),
    "joint": HardConstrained(NETWORK, EQUATION, BLENDED, joint=True, **NUMBERS),
}
LINEAR, BENT = ((RATES, jnp.full(2, bend)) for bend in (0.0, 1.0))


@functools.cache
def program(kind):
    """Gradients in the network, the rates and the report, and the field: compiled once."""

    def loss(steepness, rates, report, bend, warm):
        layer = eqx.tree_at(lambda layer: layer.network.steepness, LAYERS[kind], steepness)
        field = layer((rates, bend), report=report, warm=warm)
        u = jnp.where(jnp.isfinite(field.u), field.u, 0)
        value = jnp.sum(u**2 * jnp.asarray(X)[None])
        return value, (value, field)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def run(kind, inputs=BENT, steepness=NETWORK.steepness, warm=None):
    lanes = 6 if kind == "alone" else 2
    if warm is None:
        warm = LAYERS[kind].cold_start(2, inputs)
    report = BackwardReport.blank(lanes)
    return program(kind)(steepness, inputs[0], report, inputs[1], warm)


def best(matrix, right):
    """Dense least squares with a ridge."""
    n = matrix.shape[1]
    matrix = np.concatenate([matrix, np.sqrt(RIDGE) * np.eye(n)])
    return np.linalg.lstsq(matrix, np.concatenate([right, np.zeros(n)]))[0]


def rows(rate):
    """Matrix and right side of the linear equation at all points, and the basis."""
    basis = np.asarray(NETWORK((rate, 0.0))).T
    return SLOPE @ basis + float(rate) * basis, -(float(rate) * np.ones(G) + 0.3), basis


def test_experts_alone_are_dense_least_squares():
    _, (_, field) = run("alone", LINEAR)
    for i, rate in enumerate(RATES):
        matrix, right, basis = rows(rate)
        for own in BOXES.members():
            w = best(matrix[own] / np.sqrt(len(own)), right[own] / np.sqrt(len(own)))
            np.testing.assert_allclose(field.u[i, own], 1 + basis[own] @ w, atol=1e-10)
        mine = SLOPE @ np.asarray(field.u[i])
        # Where no face is near, the stitched field has the slope of its expert.
        np.testing.assert_allclose(field.residual[i, 3:5], (mine + rate * field.u[i] + 0.3)[3:5])


@pytest.mark.parametrize(
    "router", [Boxes((G,), (5,)), RandomAssignment((G,), 5, key=jax.random.key(1))]
)
def test_uneven_parts_of_any_router_are_dense_least_squares(router):
    """Parts of 5, 5, 5, 5 and 4 points, all of which are asked for at the call."""
    assert router.counts == (5, 5, 5, 5, 4)
    # Both as a router of the user's own: one program.
    layer = HardConstrained(NETWORK, EQUATION, Router(router.weights), points=4, **NUMBERS)
    field = at_points(layer, LINEAR, 5)
    for i, rate in enumerate(RATES):
        matrix, right, basis = rows(rate)
        for k, own in enumerate(router.members()):
            w = best(matrix[own] / np.sqrt(len(own)), right[own] / np.sqrt(len(own)))
            np.testing.assert_allclose(field.coefficients[i, k], w, atol=1e-7)
            np.testing.assert_allclose(field.u[i, own], 1 + basis[own] @ w, atol=1e-9)


at_points = eqx.filter_jit(lambda layer, inputs, points: layer(inputs, points=points))


def test_tied_experts_are_dense_least_squares_with_rows_for_the_jumps():
    _, (_, field) = run("tied", LINEAR)
    _, (_, alone) = run("alone", LINEAR)
    matrix, right, basis = rows(RATES[1])
    big, target = [], []
    for k, own in enumerate(BOXES.members()):
        block = np.zeros((len(own), 3 * N))
        block[:, k * N : (k + 1) * N] = matrix[own] / np.sqrt(len(own))
        big.append(block)
        target.append(right[own] / np.sqrt(len(own)))
    for (left, other), points in zip(BOXES.pairs, BOXES.faces, strict=True):
        block = np.zeros((len(points), 3 * N))
        side = 5.0 * basis[points] / np.sqrt(len(points))
        block[:, left * N : (left + 1) * N] = side
        block[:, other * N : (other + 1) * N] = -side
        big.append(block)
        target.append(np.zeros(len(points)))
    w = best(np.concatenate(big), np.concatenate(target)).reshape(3, N)
    exact = np.concatenate([1 + basis[own] @ w[k] for k, own in enumerate(BOXES.members())])
    np.testing.assert_allclose(field.u[1], exact, atol=1e-9)
    assert np.all(field.jump < 0.2 * alone.jump)


def test_joint_experts_are_dense_least_squares_on_the_field_that_they_make():
    _, (_, field) = run("joint", LINEAR)
    basis = np.asarray(NETWORK((RATES[1], 0.0)))
    blended = (BLENDED.weights[:, None] * basis[None]).reshape(3 * N, G).T
    matrix = SLOPE @ blended + float(RATES[1]) * blended
    right = -(float(RATES[1]) + 0.3) * np.ones(G)
    w = best(matrix / np.sqrt(G), right / np.sqrt(G))
    np.testing.assert_allclose(field.u[1], 1 + blended @ w, atol=1e-9)
    np.testing.assert_allclose(field.coefficients[1].ravel() @ blended.T + 1, field.u[1])
    # No other field in the span has a smaller residual, and what is reported is its own.
    np.testing.assert_allclose(field.residual[1], matrix @ w - right, atol=1e-9)


def test_joint_experts_solve_what_is_not_local_and_keep_balances():
    exact = np.exp(-4 * X)
    mean = Equation(  # u' = the mean of u and something known, u(0) = 1
        lambda u: jnp.stack([jnp.asarray(SLOPE) @ u, jnp.broadcast_to(jnp.mean(u), u.shape)]),
        lambda z, known: z[0] - z[1] - known,
        data=lambda _: jnp.asarray(SLOPE @ exact - exact.mean()),
        lift=lambda _: jnp.ones(G),
        balance=lambda z, _: z[1, :1] - exact.mean(),
    )
    powers = lambda _: jnp.stack([jnp.asarray(X), jnp.asarray(X) ** 2])  # noqa: E731
    error = {}
    for joint in (True, False):
        layer = HardConstrained(powers, mean, BLENDED, joint=joint)
        field = eqx.filter_jit(layer)(RATES)
        error[joint] = np.abs(field.u[0] - exact).max()
        if joint:
            assert abs(field.u[0].mean() - exact.mean()) < 1e-12
    # An expert alone takes the mean of its own parabola, beyond its region too.
    assert error[True] < 0.1 * error[False]


@pytest.mark.parametrize("kind", LAYERS)
def test_derivatives_in_the_network_are_those_of_finite_differences(kind):
    step = 1e-3 * jnp.cos(jnp.arange(N))
    value = lambda h: float(run(kind, steepness=NETWORK.steepness + h * step)[1][0])  # noqa: E731
    # Richardson: the error of central differences of two lengths is of fourth order.
    central = [(value(h) - value(-h)) / (2 * h) for h in (1.0, 0.5)]
    (slope, _, report), _ = run(kind)
    assert float(jnp.vdot(slope, step)) == pytest.approx((4 * central[1] - central[0]) / 3, 1e-6)
    assert not np.any(report.failed)


def test_a_balance_holds_exactly_whatever_the_residuals():
    gap = {}
    for kind in ("held", "alone"):
        _, (_, field) = run(kind)
        gap[kind] = np.abs(jax.vmap(area)(field.z, BENT)).max()
        assert np.all(np.asarray(field.lanes.status == tolerax.PointStatus.ok))
    assert gap["held"] <= 1e-13
    assert gap["alone"] > 1e-7


def test_a_warm_start_that_leads_away_is_left_out():
    (cold, _, _), (_, field) = run("alone")
    far = jax.tree.map(lambda leaf: leaf, field.warm)
    far = dataclasses.replace(far, w=far.w.at[0].set(1e3))
    (slope, _, _), (_, again) = run("alone", warm=far)
    np.testing.assert_allclose(again.u, field.u, atol=1e-8)
    np.testing.assert_allclose(slope, cold, rtol=1e-7)
    lanes = field.lanes.evaluations.reshape(2, -1), again.lanes.evaluations.reshape(2, -1)
    np.testing.assert_array_equal(lanes[0][0], lanes[1][0])


def test_a_warm_start_saves_evaluations_and_changes_nothing():
    (cold, _, _), (_, field) = run("alone")
    (warm, _, _), (_, again) = run("alone", warm=field.warm)
    assert np.all(again.lanes.evaluations == 1)
    assert np.all(field.lanes.evaluations > 2)
    np.testing.assert_allclose(warm, cold, rtol=1e-7)


def test_a_sample_that_is_no_number_fails_alone():
    (_, clean, _), (_, fine) = run("alone")
    (_, slope, report), (_, field) = run("alone", (RATES.at[0].set(jnp.nan), BENT[1]))
    failed = np.asarray(field.lanes.status == tolerax.PointStatus.failed)
    assert failed.tolist() == [True] * 3 + [False] * 3
    assert report.failed.tolist() == [1] * 3 + [0] * 3
    np.testing.assert_allclose(field.u[1], fine.u[1], rtol=1e-12)
    np.testing.assert_allclose(slope[1], clean[1], rtol=1e-9)


def test_a_basis_that_has_lost_its_rank_still_has_an_answer_and_a_derivative():
    (slope, _, report), (_, field) = run("alone", steepness=jnp.array([0.5, 1.0, 1.0, 1.0]))
    assert np.all(np.isfinite(slope))
    assert np.all(field.lanes.condition > 1e2)
    assert not np.any(report.failed)


def test_boxes_that_overlap_points_that_are_drawn_and_rows_for_everyone():
    boxes, mask = Boxes((G,), (2,), overlap=3), np.arange(G) == 0
    np.testing.assert_allclose(boxes.weights.sum(axis=0), 1.0)
    assert not boxes.pairs
    assert boxes.counts == (15, 15)
    pinned = Equation(
        channels,
        lambda z, data: jnp.where(data[1], 30 * (z[0] - 1), z[1] + data[0] * z[0]),
        data=lambda rate: (rate, jnp.asarray(mask)),
        everywhere=mask,
    )
    network = lambda rate: jnp.stack([jnp.asarray(X) ** k for k in range(N)])  # noqa: E731
    layer = HardConstrained(network, pinned, boxes, points=10)
    solve = jax.jit(lambda key: layer(RATES, key=key).u)
    # Both experts solve u' = -rate u with u(0) = 1, each with a cubic of its own.
    np.testing.assert_allclose(
        solve(jax.random.key(0)), np.exp(-RATES[:, None] * X[None]), atol=0.05
    )
    np.testing.assert_array_equal(solve(jax.random.key(0)), solve(jax.random.key(0)))
    assert np.any(solve(jax.random.key(0)) != solve(jax.random.key(1)))


def test_boxes_on_a_circle_are_alike_and_have_a_face_more():
    boxes = Boxes((12, 8), (3, 2), overlap=(2, 0), periodic=(True, False))
    np.testing.assert_allclose(boxes.weights.sum(axis=0), 1.0)
    first = boxes.weights[0, :, 0]
    np.testing.assert_allclose(first, np.roll(first[::-1], 4))  # about its middle
    np.testing.assert_allclose(np.roll(first, 4), boxes.weights[2, :, 0])
    assert not np.any(boxes.weights[0, :, 4:])
    around = Boxes((12,), (3,), periodic=True)
    assert around.pairs == ((0, 1), (1, 2), (2, 0))
    assert around.faces[2].tolist() == [0, 11]
    assert not Boxes((12,), (1,), periodic=True).pairs
    # Along the axis without an overlap there are faces, as long as those who meet there reach.
    assert boxes.pairs == ((0, 1), (2, 3), (4, 5))
    assert boxes.faces[0].tolist() == sorted(8 * i + j for i in (10, 11, *range(6)) for j in (3, 4))
    assert not Boxes((12, 8), (3, 2), overlap=2).pairs


def test_bad_input_is_named():
    def layer(equation=EQUATION, network=NETWORK, router=BOXES, **options):
        return HardConstrained(network, equation, router, **options)(BENT)

    matrix = Equation(channels, lambda z, _: z)
    flat = Equation(lambda u: u, EQUATION.residual)
    short = Equation(channels, EQUATION.residual, everywhere=X[:3] > 0)
    random = RandomAssignment((G,), 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="expert 0 has 3 points for 4 coefficients"):
        layer(points=3)
    for points in (0, -3):
        with pytest.raises(ValueError, match=f"points is {points}"):
            LAYERS["alone"](BENT, points=points)
    with pytest.raises(ValueError, match="joint experts have 24 points for 27 coefficients"):
        layer(network=lambda _: jnp.ones((9, G)), router=BLENDED, joint=True)
    for crooked in (lambda u: jnp.stack([u, u**2]), lambda u: jnp.stack([u, u + 1])):
        with pytest.raises(ValueError, match="channels are not linear"):
            layer(Equation(crooked, EQUATION.residual))
    many = dataclasses.replace(HELD, balance=lambda z, _: z[0])
    with pytest.raises(ValueError, match="balance returned 24 numbers"):
        layer(many)
    with pytest.raises(ValueError, match="residual of the equation has shape"):
        layer(matrix)
    with pytest.raises(ValueError, match="channels returned shape"):
        layer(flat)
    with pytest.raises(ValueError, match="network returned shape"):
        layer(network=lambda inputs: jnp.ones((N, 7)))
    with pytest.raises(ValueError, match="everywhere has shape"):
        layer(short)
    with pytest.raises(ValueError, match="no faces to tie"):
        layer(router=random, faces=1.0)
    with pytest.raises(ValueError, match="joint experts are tied"):
        layer(joint=True, faces=1.0)
    with pytest.raises(ValueError, match="boxes would be empty"):
        Boxes((3,), (4,))
    with pytest.raises(ValueError, match="give one for all axes"):
        Boxes((4, 4), (2, 2), overlap=(1, 1, 1))
    with pytest.raises(ValueError, match=r"experts \[1\] have no points"):
        Router(np.stack([np.ones(5), np.zeros(5)]))
    with pytest.raises(ValueError, match="partition of unity"):
        Router(np.ones((2, 5)))
    with pytest.raises(ValueError, match="experts is 9"):
        RandomAssignment((2, 2), 9, key=jax.random.key(0))
    with pytest.raises(ValueError, match="warm has coefficients"):
        LAYERS["alone"](BENT, warm=LAYERS["tied"].cold_start(2, BENT))
    with pytest.raises(ValueError, match="held returned shape"):
        tolerax.batched_least_squares(lambda w, _: w, jnp.ones((1, 2)), held=(lambda w, _: w, None))
