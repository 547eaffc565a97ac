"""What is counted and bounded everywhere: accuracies, work, and where constants come from."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

Origin = Literal["given", "proved", "estimated"]


class Accuracy(eqx.Module):
    """Absolute tolerances in the natural norm of a problem, or the errors that were achieved.

    Both are traced arrays: changing them never recompiles. `inf` asks for nothing.

    - `state`: on the distance of the state (lower-level solution) from the exact one.
    - `adjoint`: on the error of the adjoint solve at that state. An adjoint never inherits the
      tolerance of the state.

    >>> Accuracy(1e-3, 1e-4) * 0.5
    Accuracy(state=5.0e-04, adjoint=5.0e-05)
    """

    state: Float[Array, "*batch"]
    adjoint: Float[Array, "*batch"]

    def __init__(self, state: ArrayLike, adjoint: ArrayLike):
        self.state = jnp.asarray(state, dtype=jnp.result_type(float, state))
        self.adjoint = jnp.asarray(adjoint, dtype=jnp.result_type(float, adjoint))

    def __mul__(self, factor: ArrayLike) -> "Accuracy":
        return Accuracy(self.state * factor, self.adjoint * factor)

    def __repr__(self) -> str:
        try:
            return f"Accuracy(state={float(self.state):.1e}, adjoint={float(self.adjoint):.1e})"
        except (TypeError, jax.errors.ConcretizationTypeError):
            return f"Accuracy(state={self.state}, adjoint={self.adjoint})"

    @property
    def total(self) -> Float[Array, "*batch"]:
        """The sum, for the two parts of an error bound."""
        return self.state + self.adjoint


class Work(eqx.Module):
    """Work by kind. Every solver and benchmark reports cost in these, because wall time alone
    hides inner work.

    A batch of runs, or the history of one, has these with leading axes.

    `units` adds what costs about as much as one pass over the data: points of a plain function,
    lower-level gradients, Hessian products, PDE solves and network passes.

    >>> (Work(lower_gradients=3) + Work(lower_gradients=1, hessian_products=2)).units
    Array(6, dtype=int64...)
    """

    points: Int[Array, "*batch"]
    values: Int[Array, "*batch"]
    gradients: Int[Array, "*batch"]
    lower_gradients: Int[Array, "*batch"]
    hessian_products: Int[Array, "*batch"]
    linear_iterations: Int[Array, "*batch"]
    pde_solves: Int[Array, "*batch"]
    network_passes: Int[Array, "*batch"]

    def __init__(
        self,
        points: ArrayLike = 0,
        values: ArrayLike = 0,
        gradients: ArrayLike = 0,
        lower_gradients: ArrayLike = 0,
        hessian_products: ArrayLike = 0,
        linear_iterations: ArrayLike = 0,
        pde_solves: ArrayLike = 0,
        network_passes: ArrayLike = 0,
    ):
        def count(n: ArrayLike) -> Int[Array, "*batch"]:
            return jnp.asarray(n, dtype=jnp.result_type(int))

        self.points = count(points)
        self.values = count(values)
        self.gradients = count(gradients)
        self.lower_gradients = count(lower_gradients)
        self.hessian_products = count(hessian_products)
        self.linear_iterations = count(linear_iterations)
        self.pde_solves = count(pde_solves)
        self.network_passes = count(network_passes)

    def __add__(self, other: "Work") -> "Work":
        # As one array: compiled, eight sums of scalars are eight kernels.
        names = tuple(Work.__dataclass_fields__)
        counts = [jnp.stack([getattr(w, name) for name in names]) for w in (self, other)]
        return Work(**dict(zip(names, counts[0] + counts[1], strict=True)))

    @property
    def units(self) -> Int[Array, "*batch"]:
        """Passes over the data. A point whose evaluation is itself counted in lower-level
        gradients, PDE solves or network passes adds nothing of its own."""
        inner = self.lower_gradients + self.hessian_products + self.pde_solves + self.network_passes
        return jnp.where(inner > 0, inner, self.points)

    def as_dict(self) -> dict[str, int]:
        """The counts that are not zero, as Python integers."""
        counts = {name: int(np.asarray(value).sum()) for name, value in vars(self).items()}
        return {name: value for name, value in counts.items() if value}


class Provenance(eqx.Module):
    """Where every constant in the error bounds comes from. Static: it never changes in a run.

    >>> Provenance((("strong_convexity", "proved"), ("upper_smoothness", "estimated"))).certified
    False
    """

    constants: tuple[tuple[str, Origin], ...] = eqx.field(static=True, default=())

    @property
    def certified(self) -> bool:
        """Whether no constant is an estimate."""
        return all(origin != "estimated" for _, origin in self.constants)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {origin}" for name, origin in self.constants) or "exact"
