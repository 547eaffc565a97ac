"""Reference solves: what f and its gradient truly are. Their work is never charged to anyone.

`Dense` uses dense Newton steps and is for problems of up to a few thousand lower-level unknowns. It
reports the Newton decrement that it reached, so that a check can see what it was checked against.
`tight_loss` works without matrices and is for the loss of an iterate of a larger problem.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

import tolerax

Level = Callable[[PyTree, PyTree], Float[Array, ""]]  # upper(y, x) or lower(y, x)


def both_levels(problem: tolerax.Bilevel) -> tuple[Level, Level]:
    """Upper and lower level of a problem as functions of (y, x)."""
    lower = problem.oracle.potential
    assert lower is not None
    return problem.oracle.cost, lower


class Truth(NamedTuple):
    """True value and gradient at x, the lower-level solution, and how well it was found: the
    decrement |grad h|_{H^-1} bounds the error of y in the energy norm to first order."""

    value: float
    gradient: PyTree
    y: PyTree
    decrement: float


@eqx.filter_jit
def _value_and_gradient(level: Level, y: PyTree, x: PyTree) -> tuple[Array, PyTree]:
    return jax.value_and_grad(level)(y, x)


@eqx.filter_jit
def _dense_hessian(level: Level, y: PyTree, x: PyTree) -> Float[Array, "m m"]:
    flat, unravel = ravel_pytree(y)
    gradient = jax.grad(lambda v: level(unravel(v), x))
    product = jax.linearize(gradient, flat)[1]
    return jax.lax.map(product, jnp.eye(flat.size, dtype=flat.dtype), batch_size=64)


@eqx.filter_jit
def _hypergradient(upper: Level, lower: Level, y: PyTree, x: PyTree, q: PyTree) -> PyTree:
    def with_adjoint(x: PyTree) -> Array:
        force = jax.grad(lower)(y, x)
        pairing = jax.tree.map(lambda a, b: jnp.sum(a * b), q, force)
        return upper(y, x) - sum(jax.tree.leaves(pairing))

    return jax.grad(with_adjoint)(x)


class Dense(NamedTuple):
    """True value and gradient of x -> upper(y*(x), x) by dense Newton steps in float64.

    >>> import jax.numpy as jnp
    >>> truth = Dense(lambda y, x: jnp.sum(y**2), lambda y, x: jnp.sum((y - x) ** 2))
    >>> result = truth(jnp.ones(2), jnp.zeros(2))
    >>> result.value, result.gradient
    (2.0, Array([2., 2.], dtype=float64))
    """

    upper: Level
    lower: Level
    tolerance: float = 1e-12
    max_steps: int = 100

    @staticmethod
    def of(problem: tolerax.Bilevel) -> "Dense":
        """For a problem of the library."""
        return Dense(*both_levels(problem))

    def __call__(self, x: PyTree, y: PyTree) -> Truth:
        """The truth at x; y is where Newton's method starts."""
        y, decrement = self.solve(x, y)
        _, unravel = ravel_pytree(y)
        hessian = np.asarray(_dense_hessian(self.lower, y, x))
        _, slope = _value_and_gradient(self.upper, y, x)
        adjoint = unravel(jnp.asarray(np.linalg.solve(hessian, np.asarray(ravel_pytree(slope)[0]))))
        value, _ = _value_and_gradient(self.upper, y, x)
        _, force = _value_and_gradient(self.lower, y, x)
        # The adjoint-corrected value is wrong by the square of the decrement only.
        value = value - np.dot(ravel_pytree(adjoint)[0], ravel_pytree(force)[0])
        gradient = _hypergradient(self.upper, self.lower, y, x, adjoint)
        return Truth(float(value), gradient, y, decrement)

    def solve(self, x: PyTree, y: PyTree) -> tuple[PyTree, float]:
        """Newton steps with step halving until the decrement is below the tolerance relative to
        |y|_H, or as small as rounding lets it become; the factor is kept while it serves."""
        flat, unravel = ravel_pytree(y)
        flat = np.asarray(flat)
        previous, factor = np.inf, None
        best = (flat, np.inf)
        for _ in range(self.max_steps):
            value, gradient = _value_and_gradient(self.lower, unravel(jnp.asarray(flat)), x)
            g = np.asarray(ravel_pytree(gradient)[0])
            if factor is None:
                hessian = np.asarray(_dense_hessian(self.lower, unravel(jnp.asarray(flat)), x))
                factor = np.linalg.cholesky(hessian)
            half = np.linalg.solve(factor, g)
            decrement = float(np.linalg.norm(half))
            scale = max(float(np.linalg.norm(factor.T @ flat)), 1.0)
            if decrement < best[1]:
                best = (flat, decrement)
            if decrement <= self.tolerance * scale:
                break
            if decrement <= 1e-9 * scale and decrement > previous / 2:
                break  # rounding: no step improves it further
            step = -np.linalg.solve(factor.T, half)
            t = 1.0
            while decrement > 1e-6 * scale and not (
                float(_value_and_gradient(self.lower, unravel(jnp.asarray(flat + t * step)), x)[0])
                <= float(value) - 1e-4 * t * decrement**2
            ):
                t /= 2
                if t < 1e-10:
                    raise RuntimeError("the reference solve found no decrease of the lower level")
            if decrement > previous / 10:
                factor = None  # converging too slowly on the old factor
            previous = decrement
            flat = flat + t * step
        else:
            raise RuntimeError(f"the reference solve took more than {self.max_steps} steps")
        return unravel(jnp.asarray(best[0])), best[1]


@eqx.filter_jit
def tight_solve(lower: Level, y: PyTree, x: PyTree, reduction: float = 1e-9) -> PyTree:
    """The lower-level solution to a gradient norm of `reduction` times the one at y = 0, without
    matrices: Newton steps by conjugate gradients, Armijo halving. NaN when 200 steps fail."""
    flat, unravel = ravel_pytree(y)

    def objective(v: Array) -> Array:
        return lower(unravel(v), x)

    gradient = jax.grad(objective)
    first = jnp.linalg.norm(gradient(jnp.zeros_like(flat)))
    target = reduction * first

    def newton(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, g, k = carry
        norm = jnp.linalg.norm(g)
        product = jax.linearize(gradient, v)[1]
        forcing = jnp.minimum(0.1, jnp.sqrt(norm)) * norm
        step = jax.scipy.sparse.linalg.cg(product, -g, tol=0.0, atol=forcing, maxiter=1000)[0]
        value, slope = objective(v), g @ step

        def too_long(t: Array) -> Array:
            end, there = jax.value_and_grad(objective)(v + t * step)
            # A slope that is still negative, or a smaller gradient, proves a decrease of a convex
            # function where its values, sums of terms that cancel, do not resolve one.
            lower = (end <= value + 1e-4 * t * slope) | (there @ step <= 0)
            smaller = jnp.linalg.norm(there) <= 0.9 * norm
            return ~lower & ~(smaller & (norm < 1e-6 * first)) & (t > 1e-8)

        t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
        v = v + t * step
        return v, gradient(v), k + 1

    def running(carry: tuple[Array, Array, Array]) -> Array:
        return (jnp.linalg.norm(carry[1]) > target) & (carry[2] < 200)

    start = (flat, gradient(flat), jnp.array(0))
    v, g, _ = jax.lax.while_loop(running, newton, start)
    return unravel(jnp.where(jnp.linalg.norm(g) <= target, v, jnp.nan))


def tight_loss(upper: Level, lower: Level, x: PyTree, y: PyTree) -> tuple[float, PyTree]:
    """True upper loss at x, the lower level solved tightly from y; and that solution."""
    if ravel_pytree(y)[0].size <= 2000:
        # Also where conjugate gradients do not get there.
        y = Dense(upper, lower, tolerance=1e-10).solve(x, y)[0]
    else:
        y = tight_solve(lower, y, x)
    if not np.isfinite(ravel_pytree(y)[0]).all():
        raise RuntimeError("the reference solve of the lower level failed")
    return float(_value_and_gradient(upper, y, x)[0]), y
