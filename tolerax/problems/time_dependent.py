"""Problems whose state evolves: minimize a cost of the trajectory of `dy/dt = f(t, y, u)`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Evaluation, Problem, Provenance, Query
from tolerax.inner.metric import Metric, definite_norm
from tolerax.problems.implicit_euler import ImplicitEuler
from tolerax.validation import check_like

Scalar = Float[Array, ""]


class TimeDependent(Problem):
    """Minimize `cost(y(t1), x)` plus the integral of `running_cost(t, y, u)` over x, where y starts
    from `y0` and `dy/dt = vector_field(t, y, u)`.

    The method integrates to the accuracy that a solver asks for; value and gradient come with
    estimates of their errors, and results are never called certified.

    **Arguments:**

    - `vector_field(t, y, u)`: f, a pytree like y. `running_cost(t, y, u)`: scalar, or `None`.
      `cost(y, x)`: scalar, or `None`; at least one of the two.
    - `y0`: pytree, or a callable x -> pytree where the start depends on x.
    - `controls`: callable x -> pytree whose leaves have a leading axis: u on intervals of equal
      length from t0 to t1. Targets and sources that change with time can ride along:
      `lambda x: (x, target)`. `None`: u is x, at all times.
    - `times`: the pair (t0, t1).
    - `method`: [`ImplicitEuler`][]: its discrete solution is the truth, and inexact are the solves
      in its steps; or [`AdaptiveSteps`][]: the solution of the differential equation is the truth,
      and the tolerance is that of a step size controller.
    - `weight`: of the inner product of states, for a state on a grid the area of a cell.
    - `metric`: the inner product on x, see [`Implicit`][]; for a control in time and space the
      area of a cell times the length of an interval. `bounds`: pair of pytrees like x, or scalars.

    `Accuracy.state` bounds the error of states, `Accuracy.adjoint` that of adjoints (times
    `weight` they are derivatives of the cost by the state), both in the norm that belongs to
    `weight`, over all times with implicit Euler. Adaptive steps know the first only, at t1: their
    gradient is that of the steps that were made, and no adjoint equation is solved.

    >>> import equinox as eqx, jax.numpy as jnp, tolerax
    >>> problem = tolerax.TimeDependent(
    ...     lambda t, y, rate: -rate * y,
    ...     lambda y, rate: y,
    ...     jnp.array(1.0),
    ...     method=tolerax.ImplicitEuler(steps=10, symmetric=True),
    ... )
    >>> query = tolerax.Query(jnp.array(1.0), tolerax.Accuracy(1e-8, 1e-8))
    >>> found = eqx.filter_jit(problem.evaluate)(query)
    >>> round(float(found.value), 6), round(1.1**-10, 6)
    (0.385543, 0.385543)
    """

    vector_field: Callable
    cost: Callable | None
    y0: Any
    running_cost: Callable | None
    controls: Callable | None
    times: tuple[Scalar, Scalar]
    method: Any
    weight: Scalar
    metric: Metric | None
    bounds: tuple[PyTree, PyTree] | None

    def __init__(
        self,
        vector_field: Callable[[Scalar, PyTree, PyTree], PyTree],
        cost: Callable[[PyTree, PyTree], Scalar] | None,
        y0: PyTree[Float[Array, "..."]] | Callable[[PyTree], PyTree],
        *,
        running_cost: Callable[[Scalar, PyTree, PyTree], Scalar] | None = None,
        controls: Callable[[PyTree], PyTree] | None = None,
        times: tuple[Any, Any] = (0.0, 1.0),
        method: Any = None,
        weight: Any = 1.0,
        metric: Any = None,
        bounds: tuple[PyTree, PyTree] | None = None,
    ):
        if cost is None and running_cost is None:
            raise ValueError("cost and running_cost are None: give at least one of them.")
        for name, given in (
            ("vector_field", vector_field),
            ("cost", cost),
            ("running_cost", running_cost),
            ("controls", controls),
        ):
            if not callable(given) and not (given is None and name != "vector_field"):
                raise TypeError(f"{name} is {given!r}: give a callable.")
        if not isinstance(times, tuple | list) or len(times) != 2 or not times[0] < times[1]:
            raise ValueError(f"times is {times!r}: give a pair (t0, t1) with t0 < t1.")
        if not float(weight) > 0:
            raise ValueError(f"weight is {weight!r}: it must be positive.")
        if not callable(y0):
            leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(y0)]
            if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
                raise TypeError(
                    "y0 must be a pytree of float arrays with at least one entry, or a callable "
                    "of x that returns one."
                )
            y0 = jax.tree.map(jnp.asarray, y0)
        self.vector_field, self.cost, self.y0 = vector_field, cost, y0
        self.running_cost, self.controls = running_cost, controls
        self.times = (jnp.asarray(times[0], float), jnp.asarray(times[1], float))
        self.method = ImplicitEuler() if method is None else method
        if not callable(getattr(self.method, "evaluate", None)):
            raise TypeError(
                f"method is {method!r}: give a method of steps, for instance "
                "`tolerax.ImplicitEuler(100)` or `tolerax.AdaptiveSteps()`."
            )
        self.weight = jnp.asarray(weight, float)
        self.metric = Metric.of(metric)
        self.bounds = bounds

    @property
    def provenance(self) -> Provenance:
        return Provenance((("errors", "estimated"),))

    def cold_start(self) -> PyTree:
        return self.method.cold_start()

    def evaluate(self, query: Query) -> Evaluation:
        def point(x: PyTree, accuracy: Any, carry: PyTree) -> Evaluation:
            self._check_field(x)
            return self.method.evaluate(self, x, accuracy, carry, query.derivatives)

        carry = self.cold_start() if query.carry is None else query.carry
        if query.mask is None:
            answer = point(query.x, query.accuracy, carry)
            return dataclasses.replace(answer, metric=self.metric)
        count, mask = query.mask.shape[0], query.mask
        if query.carry is None:
            spread = lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf)))  # noqa: E731
            carry = jax.tree.map(spread, carry)
        accuracy = jax.tree.map(lambda t: jnp.broadcast_to(t, (count,)), query.accuracy)
        answers = eqx.filter_vmap(point)(query.x, accuracy, carry)
        counted = lambda n: jnp.sum(jnp.where(mask, n, 0))  # noqa: E731
        return eqx.tree_at(lambda e: e.work, answers, jax.tree.map(counted, answers.work))

    def control(self, x: PyTree) -> PyTree:
        """u at the start."""
        if self.controls is None:
            return x
        # Methods say what they need of leaves without intervals.
        return jax.tree.map(lambda leaf: leaf[0] if jnp.ndim(leaf) else leaf, self.controls(x))

    def _check_field(self, x: PyTree) -> None:
        field = lambda x: self.vector_field(self.times[0], self.start(x), self.control(x))  # noqa: E731
        state = jax.eval_shape(self.start, x)
        check_like("vector_field", jax.eval_shape(field, x), state, "y0")

    def start(self, x: PyTree) -> PyTree:
        """y(t0) as a pytree."""
        return self.y0(x) if callable(self.y0) else self.y0

    def final_cost(self, y: PyTree, x: PyTree) -> Scalar:
        """`cost(y(t1), x)`, 0 without one."""
        return jnp.zeros(()) if self.cost is None else self.cost(y, x)

    def dual_norm(self, g: PyTree) -> Scalar:
        """The norm of gradients."""
        z = g if self.metric is None else self.metric.solve(g)
        return definite_norm(ravel_pytree(g)[0], ravel_pytree(z)[0])
