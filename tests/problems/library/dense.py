"""The constants of a bilevel problem by dense linear algebra and by search: the slow, sure way."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from tolerax.problems.constants import constant
from tolerax.problems.library import LibraryProblem


class Dense:
    """A problem at points (y, x) on flat vectors, with its derivatives as matrices."""

    def __init__(self, problem: LibraryProblem):
        self.problem = problem
        y0, self.y_of = ravel_pytree(problem.y0)
        x0, self.x_of = ravel_pytree(problem.x0)
        self.y0, self.x0 = np.asarray(y0), np.asarray(x0)

        def lower(y, x):
            return problem.lower(self.y_of(y), self.x_of(x))

        def upper(y, x):
            return problem.upper(self.y_of(y), self.x_of(x))

        F = jax.grad(lower)

        def state_part(y, q, x):
            return jax.grad(upper, 1)(y, x) - jax.vjp(lambda x: F(y, x), x)[1](q)[0]

        self.gradient = jax.jit(F)
        self.hessian = jax.jit(jax.hessian(lower))
        self.hessian_change = jax.jit(
            lambda v, y, x: jax.jvp(lambda y: jax.hessian(lower)(y, x), (y,), (v,))[1]
        )
        self.upper_hessian = jax.jit(jax.hessian(upper))
        self.upper_gradient = jax.jit(jax.grad(upper))
        self.cross = jax.jit(jax.jacrev(F, 1))  # F_x, shape (y, x)
        self.state_matrix = jax.jit(jax.jacrev(state_part))  # shape (x, y)

        def curvature(u, y, x):
            return jax.jvp(lambda y: jnp.vdot(F(y, x), u), (y,), (u,))[1]

        def third(u, y, x):
            """sup over unit v of |D³ lower[u, u, v]| / D² lower[u, u], squared, as its log."""
            value, slope = jax.value_and_grad(curvature, 1)(u, y, x)
            return jnp.log(jnp.sum(slope**2)) - 2 * jnp.log(value)

        def newton_step(y, x, r):
            product = jax.linearize(lambda y: F(y, x), y)[1]
            return jax.scipy.sparse.linalg.cg(product, r, tol=1e-4)[0]

        self.newton_step = jax.jit(newton_step)
        self.third = jax.jit(jax.value_and_grad(third, (0, 1)))

    def solution(self, x: np.ndarray, tolerance: float = 1e-7) -> np.ndarray:
        """The lower-level solution: Newton's method damped by 1/(1 + M λ), steps by CG."""
        y, M = jnp.asarray(self.y0), self.claimed("self_concordance", x)
        for _ in range(500):
            r = self.gradient(y, x)
            if jnp.linalg.norm(r) < tolerance:
                return np.asarray(y)
            step = self.newton_step(y, x, r)
            decrement = jnp.sqrt(jnp.vdot(step, r))
            y = y - step / (1 + jnp.minimum(M * decrement, 10.0))
        raise AssertionError(f"no lower-level solution to {tolerance} at x = {x}")

    def lower_bound(self, x: np.ndarray) -> np.ndarray:
        """The diagonal that the problem claims to bound its Hessian from below."""
        mu = constant(self.problem.constants["strong_convexity"], self.x_of(jnp.asarray(x)))
        return np.broadcast_to(ravel_pytree(mu)[0], self.y0.shape)

    def claimed(self, name: str, x: np.ndarray) -> float:
        return float(constant(self.problem.constants[name], self.x_of(jnp.asarray(x))))

    def claimed_along(self, v: np.ndarray, x: np.ndarray) -> float:
        """The bound on |D³ lower[u, u, v]| / D² lower[u, u] for this v."""
        point = self.y_of(jnp.asarray(v)), self.x_of(jnp.asarray(x))
        return float(constant(self.problem.constants["self_concordance_along"], *point))

    def cross_bounds(self, y: np.ndarray, q: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The bounds (adjoint, state, both) that the problem claims."""
        point = self.y_of(jnp.asarray(y)), self.y_of(jnp.asarray(q)), self.x_of(jnp.asarray(x))
        bounds = constant(self.problem.constants["cross"], *point)
        return np.array([bounds.adjoint, bounds.state, bounds.both])


def true_cross_bounds(
    dense: Dense,
    H: np.ndarray,
    y: np.ndarray,
    q: np.ndarray,
    x: np.ndarray,
    steps: list[np.ndarray],
) -> np.ndarray:
    """(B1, B2) exactly, and B12 as the largest ratio over the directions and lengths in `steps`."""
    values, vectors = np.linalg.eigh(H)
    root = vectors / np.sqrt(values)  # root @ root.T is the inverse of H
    Fx = np.asarray(dense.cross(y, x))
    both = 0.0
    for e in steps:
        change = np.asarray(dense.cross(y + e, x)) - Fx
        both = max(both, spectral_norm(change.T @ root) / np.sqrt(e @ H @ e))
    state = np.asarray(dense.state_matrix(y, q, x))
    return np.array([spectral_norm(Fx.T @ root), spectral_norm(state @ root), both])


def spectral_norm(matrix: np.ndarray) -> float:
    """The largest singular value, from the smaller Gram matrix: 10 times faster than the SVD."""
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))


def worst_third_derivative(
    dense: Dense, x: np.ndarray, starts: list[tuple[np.ndarray, np.ndarray]], steps: int = 200
) -> float:
    """The largest |D³ lower[u, u, v]|/(‖v‖ D² lower[u, u]) that ascent over (u, y) finds."""

    def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
        u, y = np.split(z, 2)
        value, slopes = dense.third(u, y, x)
        return -float(value), -np.concatenate(slopes)

    def ascend(u: np.ndarray, y: np.ndarray) -> float:
        start = np.concatenate([u, y])
        options = {"maxiter": steps}
        return -scipy.optimize.minimize(
            negative, start, jac=True, method="L-BFGS-B", options=options
        ).fun

    return float(np.exp(0.5 * max(ascend(u, y) for u, y in starts)))
