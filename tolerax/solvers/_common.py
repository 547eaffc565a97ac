"""What gradient-based solvers share: a flat view of x within its bounds."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from tolerax.contracts import Accuracy, Start
from tolerax.inner.metric import Metric, definite_norm
from tolerax.status import PointStatus, Status
from tolerax.validation import check_options


class Box(eqx.Module):
    """Bounds on the flat x, and how to turn it back into the user's pytree."""

    lower: Float[Array, " n"]
    upper: Float[Array, " n"]
    like: PyTree

    @classmethod
    def of(cls, start: Start) -> "Box":
        """The bounds of a start, infinite where there are none."""
        x, _ = ravel_pytree(start.x)
        like = jax.tree.map(jnp.zeros_like, start.x)
        if start.bounds is None:
            return cls(jnp.full_like(x, -jnp.inf), jnp.full_like(x, jnp.inf), like)
        lower, upper = (ravel_pytree(side)[0] for side in start.bounds)
        return cls(lower, upper, like)

    def clip(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The nearest point within the bounds."""
        return jnp.clip(x, self.lower, self.upper)

    def unravel(self, x: Float[Array, " n"]) -> PyTree:
        """The flat x as the user's pytree."""
        return ravel_pytree(self.like)[1](x)

    def blocked(self, x: Float[Array, " n"], z: Float[Array, " n"]) -> Bool[Array, " n"]:
        """Where x is at a bound and the gradient z pushes against it."""
        return ((x <= self.lower) & (z > 0)) | ((x >= self.upper) & (z < 0))

    def stationarity(self, x: Float[Array, " n"], z: Float[Array, " n"]) -> Float[Array, ""]:
        """Norm of the projected gradient: the limit of `|P(x - t z) - x| / t` as t falls to 0."""
        return jnp.linalg.norm(jnp.where(self.blocked(x, z), 0, z))


class Geometry:
    """The flat x in the metric of an answer: its own norm for steps, the dual one for gradients;
    infinite where the metric is seen not to be positive definite."""

    def __init__(self, metric: Metric | None, box: Box):
        self.metric, self.box = metric, box

    def riesz(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """The gradient that a derivative z stands for: `R^-1 z`."""
        if self.metric is None:
            return z
        return ravel_pytree(self.metric.solve(self.box.unravel(z)))[0]

    def norm(self, v: Float[Array, " n"]) -> Float[Array, ""]:
        """The norm of a step."""
        if self.metric is None:
            return jnp.linalg.norm(v)
        image = ravel_pytree(self.metric.mv(self.box.unravel(v)))[0]
        return definite_norm(v, image)

    def dual(self, z: Float[Array, " n"]) -> Float[Array, ""]:
        """The norm of a derivative."""
        if self.metric is None:
            return jnp.linalg.norm(z)
        return definite_norm(z, self.riesz(z))

    def stationarity(self, x: Float[Array, " n"], z: Float[Array, " n"]) -> Float[Array, ""]:
        """The norm of the projected derivative."""
        return self.dual(jnp.where(self.box.blocked(x, z), 0, z))


def check_accuracy(accuracy: Any) -> None:
    """Raise for a first request that is none."""
    if not isinstance(accuracy, Accuracy):
        raise TypeError(f"accuracy is {accuracy!r}: give an Accuracy(state, adjoint).")
    check_options(accuracy, at_least_0="state adjoint")


def select(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """`yes` or `no`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def resolution(
    x: Array,
    moved: Array,
    change: Array,
    dual: Callable[[Array], Array] = jnp.linalg.norm,
) -> Array:
    """How much rounding x may change the gradient, from its `change` over the last step `moved`:
    a secant curvature for each variable, at most that of the whole step; in the norm `dual`."""
    length = jnp.linalg.norm(moved)
    whole = jnp.linalg.norm(change) / jnp.where(length > 0, length, 1)
    each = jnp.abs(change) / jnp.where(moved != 0, jnp.abs(moved), jnp.inf)
    return jnp.finfo(x.dtype).eps * dual(jnp.minimum(each, whole) * x)


def lost_in(x: Float[Array, " n"], step: Array) -> Bool[Array, ""]:
    """Whether a step this long along an axis is rounded away."""
    return jnp.any(x + step == x)


def success(converged: Any, tolerance: Array, floor: Array) -> Any:
    """The status `converged`, unless the tolerance is below what rounding leaves of a gradient:
    then a criterion that holds, holds by chance."""
    return Status.where(tolerance < floor, Status.accuracy_floor, converged)


def failure(status: Any) -> Any:
    """The status of a run whose bounds cannot be tightened any more."""
    return Status.where(
        status == PointStatus.inaccurate, Status.inner_failed, Status.accuracy_floor
    )
