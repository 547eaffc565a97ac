"""Second derivatives, and Jacobians of constraints, that are given as functions or found by
differences, as operators."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree


class Matrix(eqx.Module):
    """A Hessian as a matrix over the flat x."""

    matrix: Float[Array, "*batch n n"]

    def mv(self, vector: PyTree) -> PyTree:
        """The matrix times `vector`, a pytree like x."""
        flat, unravel = ravel_pytree(vector)
        return unravel(self.matrix @ flat)


class JacobianOf(eqx.Module):
    """Products with the Jacobian of a function at a point, and with its transpose."""

    fun: Callable
    x: PyTree

    def mv(self, vector: PyTree) -> PyTree:
        """The Jacobian times `vector`, a pytree like x."""
        return jax.jvp(self.fun, (self.x,), (vector,))[1]

    def rmv(self, vector: PyTree) -> PyTree:
        """The transposed Jacobian times `vector`, a pytree like the values."""
        return jax.vjp(self.fun, self.x)[1](vector)[0]


class MatrixOfConstraints(eqx.Module):
    """The Jacobian of constraints at x as a matrix, rows and columns in the flat order of the
    constraints `values` and of x."""

    matrix: Float[Array, "*batch m n"]
    x: PyTree
    values: PyTree

    def mv(self, vector: PyTree) -> PyTree:
        """The Jacobian times `vector`, a pytree like x."""
        return ravel_pytree(self.values)[1](self.matrix @ ravel_pytree(vector)[0])

    def rmv(self, vector: PyTree) -> PyTree:
        """The transposed Jacobian times `vector`, a pytree like the constraints."""
        return ravel_pytree(self.x)[1](self.matrix.T @ ravel_pytree(vector)[0])


class ProductsOf(eqx.Module):
    """A Hessian at x whose products are a function `product(x, vector)`."""

    product_at: Callable[[PyTree, PyTree], PyTree]
    x: PyTree

    def mv(self, vector: PyTree) -> PyTree:
        """The Hessian times `vector`, a pytree like x."""
        return self.product_at(self.x, vector)


def given_hessian(hessian: Any, hessian_product: Any, x: PyTree) -> Matrix | ProductsOf | None:
    """The operator of functions that JAX can trace, if one is given."""
    if hessian_product is not None:
        return ProductsOf(hessian_product, x)
    if hessian is None:
        return None
    matrix = hessian(x)
    size = ravel_pytree(x)[0].size
    if np.shape(matrix) != (size, size):
        raise TypeError(_wrong_shape(np.shape(matrix), size))
    return Matrix(matrix)


def host_hessian(
    gradient: Callable[[np.ndarray], np.ndarray] | None,
    hessian: Callable[[np.ndarray], Any] | None,
    hessian_product: Callable[[np.ndarray, np.ndarray], Any] | None,
    x: np.ndarray,
    g: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """The Hessian of Python code over the flat x, symmetric: the matrix that is given, products
    with unit vectors, or forward differences of the gradient that keep within the bounds."""
    n = x.size
    if hessian is not None:
        matrix = np.asarray(hessian(x), x.dtype)
        if matrix.shape != (n, n):
            raise TypeError(_wrong_shape(matrix.shape, n))
    elif hessian_product is not None:
        units = np.eye(n, dtype=x.dtype)
        matrix = np.stack([np.asarray(hessian_product(x, e), x.dtype).ravel() for e in units])
    elif gradient is not None:
        matrix = np.zeros((n, n), x.dtype)
        steps = np.sqrt(np.finfo(x.dtype).eps) * np.maximum(1.0, np.abs(x))
        steps = np.where(x + steps > upper, -steps, steps)
        # Between bounds that leave no room nothing can move anyway.
        steps = np.where(x + steps < lower, 0.0, steps)
        for i, step in enumerate(steps):
            if step != 0:
                moved = x.copy()
                moved[i] += step
                matrix[i] = (gradient(moved) - g) / (moved[i] - x[i])
    else:
        raise TypeError(
            "this solver needs Hessian products, which differences of values do not give: give "
            "`gradient` (`jac`), `hessian` (`hess`) or `hessian_product` (`hessp`)."
        )
    return 0.5 * (matrix + matrix.T)


def _wrong_shape(shape: tuple[int, ...], n: int) -> str:
    return (
        f"the Hessian has shape {shape}, x has {n} entries: return a matrix of shape ({n}, {n}), "
        "or give products."
    )
