"""State equations in the norm of a Riesz map: bounds against the truth, and what is estimated.

Two equations on a small grid, with constants that can be proved.

*Semilinear*, `A y + y^3 = u` with A the Laplacian and R = A. F_y = A + diag(3 y^2) >= A between any
two states, so c = 1 everywhere. With lam the smallest eigenvalue of A, |v|_inf <= |v|_2 <=
|v|_R / sqrt(lam) and |v|_{R^-1} <= |v|_2 / sqrt(lam): for |y|, |y + e| <= Y hence
`|3 ((y + e)^2 - y^2) w|_{R^-1} <= 6 Y |e|_inf |w|_2 / sqrt(lam) <= 6 Y lam^-3/2 |e|_R |w|_R`.

*Transport*, `A y + b y_x = u`, y_x by central differences: skew, so `e'F_y e = |e|_R^2` and c = 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, PDEConstrained, Query
from tolerax.inner import CG, BiCGStab, Laplacian, NewtonKrylov
from tolerax.problems import CrossBounds, Stability
from tolerax.status import PointStatus

N, Y, ALPHA = 7, 2.0, 1e-2
LAPLACIAN = Laplacian((N, N))
LAM = float(jnp.min(LAPLACIAN.eigenvalues))
H2 = 1 / (N + 1) ** 2
TARGET = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)))
CONTROL = 20 * jnp.asarray(np.random.default_rng(1).normal(size=(N, N)))


def semilinear(y, u):
    return LAPLACIAN.mv(y) + y**3 - u


def transport(y, u):
    slope = jnp.pad(y, ((1, 1), (0, 0)))
    return LAPLACIAN.mv(y) + 15 * (slope[2:] - slope[:-2]) * (N + 1) / 2 - u


def cost(y, u):
    return 0.5 * H2 * (jnp.sum((y - TARGET) ** 2) + ALPHA * jnp.sum(u**2))


KNOWN = {
    "stability": 1.0,
    "smoothness": H2 / LAM,
    "cross": lambda y, q, u: CrossBounds(LAM**-0.5, 0.0, 0.0),
}
CASES = {
    "semilinear": (semilinear, {"curvature": 6 * Y * LAM**-1.5, "monotone": True}),
    "transport": (transport, {"curvature": 0.0}),
}


def problem(case, riesz=True, **constants):
    residual, own = CASES[case]
    own = own | {"riesz": (lambda u: LAPLACIAN.solve) if riesz else None}
    own["symmetric"] = case == "semilinear"
    return PDEConstrained(residual, cost, jnp.zeros((N, N)), **(KNOWN | own | constants))


@eqx.filter_jit
def evaluate(problem, query):
    return problem.evaluate(query)


def truth(residual):
    """The state to rounding, the value and the gradient by dense algebra."""
    flat = lambda y: residual(y.reshape(N, N), CONTROL).reshape(-1)  # noqa: E731
    y = np.zeros(N * N)
    for _ in range(30):
        y = y - np.linalg.solve(jax.jacobian(flat)(jnp.asarray(y)), flat(jnp.asarray(y)))
    assert np.abs(y).max() <= Y
    matrix = np.asarray(jax.jacobian(flat)(jnp.asarray(y)))
    q = np.linalg.solve(matrix.T, H2 * (y - np.ravel(TARGET)))
    value = cost(jnp.asarray(y).reshape(N, N), CONTROL)
    return y.reshape(N, N), float(value), H2 * ALPHA * np.asarray(CONTROL) + q.reshape(N, N)


def r_norm(e):
    return float(jnp.sqrt(jnp.vdot(e, LAPLACIAN.mv(jnp.asarray(e)))))


@pytest.mark.parametrize("case", CASES)
def test_every_error_is_below_its_bound(case):
    y, value, gradient = truth(CASES[case][0])
    made = problem(case)
    for tolerance in 10.0 ** np.arange(0, -11, -2.0):
        # The adjoint of a cost that is weighted by H2 is about that much smaller.
        query = Query(CONTROL, Accuracy(tolerance, H2 * tolerance))
        found = evaluate(made, query)
        assert found.status == PointStatus.ok
        assert float(found.achieved.state) <= tolerance
        assert float(found.achieved.adjoint) <= H2 * tolerance
        state = found.carry.y.reshape(N, N)
        assert r_norm(state - y) <= float(found.achieved.state) + 1e-12
        assert abs(float(found.value) - value) <= float(found.value_error)
        error = float(jnp.linalg.norm(found.gradient - gradient))
        assert error <= float(found.gradient_error)
        # In norms that fit the equation bounds are near the truth.
        assert float(found.gradient_error) <= 20 * error + 1e-14


@pytest.mark.parametrize("case", CASES)
def test_the_riesz_map_saves_iterations_and_work_is_counted(case):
    query = Query(CONTROL, Accuracy(1e-8, 1e-10))
    fitted = evaluate(problem(case), query)
    # The Euclidean constant: |F_y e| >= lam |e|, since e'F_y e >= lam |e|^2.
    plain = evaluate(
        problem(
            case,
            riesz=False,
            stability=LAM,
            smoothness=H2,
            cross=lambda y, q, u: CrossBounds(1.0, 0.0, 0.0),
            curvature=6 * Y * float(case == "semilinear"),
        ),
        query,
    )
    np.testing.assert_allclose(fitted.gradient, plain.gradient, atol=1e-10)
    iterations = [int(e.work.linear_iterations) for e in (fitted, plain)]
    assert iterations[0] < iterations[1]
    assert int(fitted.work.pde_solves) >= iterations[0]
    assert int(fitted.work.units) == int(fitted.work.pde_solves)
    assert int(plain.work.pde_solves) == 0
    assert int(plain.work.hessian_products) == iterations[1]


@pytest.mark.parametrize("riesz", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_estimated_constants_are_labelled_and_bound_here(case, riesz):
    _, value, gradient = truth(CASES[case][0])
    unknown = dict.fromkeys(("stability", "curvature", "smoothness", "cross"))
    made = problem(case, riesz=riesz, **unknown)
    assert not made.provenance.certified
    carry = None
    for tolerance in (1e-2, 1e-6):
        found = evaluate(made, Query(CONTROL, Accuracy(tolerance, H2 * tolerance), carry))
        carry = found.carry
        assert found.status == PointStatus.ok
        assert abs(float(found.value) - value) <= float(found.value_error)
        assert float(jnp.linalg.norm(found.gradient - gradient)) <= float(found.gradient_error)


def test_the_state_is_known_from_far_only_where_stability_holds_everywhere():
    far, curvature = jnp.full(N * N, 100.0), 6 * Y * LAM**-1.5
    flat = lambda y: semilinear(y.reshape(N, N), CONTROL).reshape(-1)  # noqa: E731
    stay = NewtonKrylov(max_steps=0)
    known = {"stability": 1.0, "curvature": curvature, "preconditioner": LAPLACIAN.flat()}
    everywhere = stay(flat, far, 1e-6, everywhere=True, **known)
    y = truth(semilinear)[0]
    assert r_norm(far.reshape(N, N) - y) <= float(everywhere.distance) < np.inf
    # Newton-Kantorovich: 2 L |r| <= c^2, or nothing is known.
    assert float(stay(flat, far, 1e-6, **known).distance) == np.inf
    # From there the solver still finds the state.
    away = eqx.tree_at(lambda p: p.y0, problem("semilinear"), far.reshape(N, N))
    assert evaluate(away, Query(CONTROL, Accuracy(1e-6, 1e-8))).status == PointStatus.ok


def test_a_stability_that_is_too_large_is_contradicted():
    # Next to an eigenvalue the adjoint is a thousand times as long as stability 1 allows.
    shift = float(jnp.sort(LAPLACIAN.eigenvalues.ravel())[1]) + 0.05
    constants = {"curvature": 0.0, "symmetric": True, "riesz": lambda u: LAPLACIAN.solve}
    soft = PDEConstrained(
        lambda y, u: LAPLACIAN.mv(y) - shift * y - u,
        cost,
        jnp.zeros((N, N)),
        **(KNOWN | constants | {"stability": jnp.array(1.0)}),
    )
    query = Query(CONTROL, Accuracy(1e-4, 1e-6))
    assert evaluate(soft, query).status == PointStatus.contradicted
    # The constant itself: eigenvalues of R^-1 F_y are 1 - shift / lam.
    c = jnp.min(jnp.abs(1 - shift / LAPLACIAN.eigenvalues))
    fitting = eqx.tree_at(lambda p: p.norm.stability, soft, c)
    assert evaluate(fitting, query).status == PointStatus.ok


@pytest.mark.parametrize(
    ("residual", "shown"),
    [
        (lambda y, u: (y - u)[:-1], r"f64\[6,7\], but y0 is f64\[7,7\]"),
        (lambda y, u: (y - u)[..., None], r"f64\[7,7,1\]"),
        (lambda y, u: {"r": y - u}, r"\{'r': *f64\[7,7\]\}"),
        (lambda y, u: jnp.sum(y - u), r"f64\[\]"),
    ],
)
def test_a_residual_unlike_the_state_is_named(residual, shown):
    made = PDEConstrained(residual, cost, jnp.zeros((N, N)))
    with pytest.raises(ValueError, match=f"residual returns .*{shown}"):
        made.evaluate(Query(CONTROL, Accuracy(1.0, 1.0)))


def test_solvers_and_riesz_maps_of_another_kind_are_named():
    with pytest.raises(TypeError, match=r"linear_solver is CG.*MINRES"):
        problem("transport", linear_solver=CG())
    made = PDEConstrained(transport, cost, CONTROL, riesz=LAPLACIAN.solve)
    with pytest.raises(TypeError, match=r"riesz returned an array.*lambda u: laplacian.solve"):
        made.evaluate(Query(CONTROL, Accuracy(1.0, 1.0)))


def test_another_linear_solver_does_as_well():
    made = problem("transport")
    norm = eqx.tree_at(
        lambda n: (n.adjoint_solver, n.state_solver.linear), made.norm, (BiCGStab(),) * 2
    )
    assert isinstance(norm, Stability)
    other = eqx.tree_at(lambda p: p.norm, made, norm)
    query = Query(CONTROL, Accuracy(1e-8, 1e-8))
    np.testing.assert_allclose(
        evaluate(other, query).gradient, evaluate(made, query).gradient, atol=1e-8
    )


def test_poisson_control_reaches_the_minimum_of_every_mode():
    """For the linear equation every mode decouples: u = (y_d / mu) / (alpha + 1 / mu^2)."""
    made = PDEConstrained(
        lambda y, u: LAPLACIAN.mv(y) - u,
        cost,
        jnp.zeros((N, N)),
        riesz=lambda u: LAPLACIAN.solve,
        curvature=0.0,
        symmetric=True,
        **KNOWN,
    )
    mu = LAPLACIAN.eigenvalues
    best = LAPLACIAN.inverse(LAPLACIAN.transform(TARGET) / mu / (ALPHA + 1 / mu**2))
    solver = tolerax.InexactLineSearch(rtol=1e-6, atol=0.0)
    solution = tolerax.solve(made, solver, jnp.zeros((N, N)), max_steps=200)
    assert bool(solution.success), solution.message
    # |u - u*| <= |gradient| / (smallest curvature = H2 alpha); the gradient was 1e-6 of H2 |p|.
    np.testing.assert_allclose(solution.x, best, atol=1e-4 * float(jnp.abs(best).max()))
