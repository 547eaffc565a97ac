"""Residuals in lanes: what a batched least-squares solver needs of them."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Vector = Float[Array, " n"]
Residual = Float[Array, " m"]
Jacobian = Float[Array, "m n"]
Square = Float[Array, "n n"]


@runtime_checkable
class Structured(Protocol):
    """Residuals of one lane that know a cheap way to their derivatives."""

    def __call__(self, w: Any, data: PyTree, /) -> Any: ...

    def with_jacobian(self, w: Any, data: PyTree, /) -> tuple[Any, Any]:
        """Residuals and their Jacobian."""
        ...

    def curvature(self, w: Any, data: PyTree, r: Any, /) -> Any:
        """`sum_i r_i r_i''(w)`."""
        ...


class Pointwise(eqx.Module):
    """Residuals `r_i = F(z_1i, ..., z_Ci; data)` of channels `z_c = Phi_c w` that are linear in w:
    a differential equation collocated at m points, with the solution in the span of n functions.

    The Jacobian is `sum_c diag(dF/dz_c) Phi_c`: C derivatives of F at every point in place of n.

    - `fun(z, data)`: from channels of shape `(C, m)` to residuals of shape `(m,)`, point by point:
      entry i may depend on column i of z only (and on `data` in any way).

    The data of a lane are a pair `(Phi, data)` with Phi of shape `(C, m, n)`.

    >>> import jax.numpy as jnp
    >>> square = Pointwise(lambda z, data: z[0] * z[1] - data)
    >>> Phi, w = jnp.ones((2, 3, 2)), jnp.array([1.0, 2.0])
    >>> r, J = square.with_jacobian(w, (Phi, jnp.zeros(3)))
    >>> J[0]
    Array([6., 6.], dtype=float64)
    """

    fun: Callable[[Any, PyTree], Any]

    def __call__(self, w: Vector, data: PyTree) -> Residual:
        Phi, more = data
        return self._at(Phi, more)(jnp.einsum("cmn,n->cm", Phi, w))

    def _at(self, Phi: Float[Array, "c m n"], more: PyTree) -> Callable:
        def fun(z: Array) -> Array:
            r = self.fun(z, more)
            if jnp.shape(r) != z.shape[1:]:
                raise ValueError(
                    f"fun returned residuals of shape {jnp.shape(r)}: give one for each of the "
                    f"{z.shape[1]} points, shape {z.shape[1:]}."
                )
            return r

        return fun

    def with_jacobian(self, w: Vector, data: PyTree) -> tuple[Residual, Jacobian]:
        """Residuals and their Jacobian."""
        Phi, more = data
        r, derivative = jax.linearize(self._at(Phi, more), jnp.einsum("cmn,n->cm", Phi, w))
        parts = [derivative(unit)[:, None] * P for unit, P in zip(_units(Phi), Phi, strict=True)]
        return r, sum(parts[1:], parts[0])

    def curvature(self, w: Vector, data: PyTree, r: Residual) -> Square:
        """`sum_i r_i r_i''(w)`, by C second derivatives at every point."""
        Phi, more = data
        gradient = jax.grad(lambda z: jnp.vdot(r, self._at(Phi, more)(z)))
        _, derivative = jax.linearize(gradient, jnp.einsum("cmn,n->cm", Phi, w))
        parts = [
            jnp.einsum("mi,dm,dmj->ij", P, derivative(unit), Phi)
            for P, unit in zip(Phi, _units(Phi), strict=True)
        ]
        return sum(parts[1:], parts[0])


def _units(Phi: Float[Array, "c m n"]) -> list[Float[Array, "c m"]]:
    """Tangents that are 1 in one channel."""
    zero = jnp.zeros(Phi.shape[:2], Phi.dtype)
    return [zero.at[c].set(1) for c in range(Phi.shape[0])]


class Plain(eqx.Module):
    """Residuals `fun(w, data)` without structure: n tangents for the Jacobian."""

    fun: Callable[[Any, PyTree], Any]

    def __call__(self, w: Vector, data: PyTree) -> Residual:
        r = self.fun(w, data)
        shape, dtype = jnp.shape(r), jnp.result_type(r)
        if len(shape) != 1:
            raise ValueError(f"residuals returned shape {shape}: give a vector, (m,), for a lane.")
        if dtype != w.dtype:
            raise TypeError(
                f"residuals returned {dtype} for w in {w.dtype}: cast w, or what residuals depend "
                "on, so that both are of one type."
            )
        return r

    def with_jacobian(self, w: Vector, data: PyTree) -> tuple[Residual, Jacobian]:
        """Residuals and their Jacobian."""
        r, derivative = jax.linearize(lambda w: self(w, data), w)
        return r, jax.vmap(derivative, out_axes=1)(jnp.eye(w.size, dtype=w.dtype))

    def curvature(self, w: Vector, data: PyTree, r: Residual) -> Square:
        """`sum_i r_i r_i''(w)`."""
        return jax.hessian(lambda w: jnp.vdot(r, self.fun(w, data)))(w)


def structured(residuals: Any) -> Structured:
    """The residuals with their derivatives."""
    if not callable(residuals):
        raise TypeError(f"residuals is {residuals!r}: give a callable (w, data) -> (m,).")
    return residuals if isinstance(residuals, Structured) else Plain(residuals)
