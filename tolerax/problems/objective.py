"""A plain function of x: values and gradients without error."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tolerax.contracts import (
    Accuracy,
    Evaluation,
    Problem,
    Provenance,
    Query,
    Work,
    constrained,
    exact_evaluation,
)
from tolerax.problems.hessians import (
    JacobianOf,
    Matrix,
    MatrixOfConstraints,
    ProductsOf,
    given_hessian,
)
from tolerax.problems.python_code import (
    DIFFERENCES,
    Row,
    Wanted,
    failed,
    like,
    names_host,
    point_status,
    points_of,
    rounding,
)
from tolerax.problems.workers import Workers
from tolerax.validation import check_order, is_concrete


class HessianOf(eqx.Module):
    """Hessian products of a function at a point, or of a function plus constraints weighted by
    multipliers, by forward over reverse differentiation."""

    fun: Callable
    x: PyTree
    with_gradient: bool = eqx.field(static=True, default=False)
    constraints: Callable | None = None
    given: Matrix | ProductsOf | None = None

    def mv(self, vector: PyTree, multipliers: PyTree = None) -> PyTree:
        """The Hessian of `fun + <multipliers, constraints>` times `vector`."""
        curved = multipliers is not None and self.constraints is not None
        if self.given is not None and not curved:
            return self.given.mv(vector)

        def value(x: PyTree) -> Array:
            value = jnp.zeros(())
            if self.given is None:
                value = _scalar(self.fun(x)[0] if self.with_gradient else self.fun(x))
            if not curved:
                return value
            assert self.constraints is not None
            terms = jax.tree.map(jnp.vdot, multipliers, self.constraints(x))
            return value + jax.tree.reduce(jnp.add, terms, 0.0)

        product = jax.jvp(jax.grad(value), (self.x,), (vector,))[1]
        if self.given is None:
            return product
        return jax.tree.map(jnp.add, product, self.given.mv(vector))


def _nothing(x: PyTree) -> None:
    """In the place of functions that are not called."""


def _scalar(value: Any) -> Array:
    """`value` as a real scalar array, or a clear error."""
    value = jnp.asarray(value) if not isinstance(value, jax.Array) else value
    if value.shape != ():
        raise TypeError(
            f"the objective returned shape {value.shape}: it must return a scalar. Sum or average "
            "what it returns."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError("the objective returned a complex number: return its real part or modulus.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"the objective returned {value.dtype}, whose gradient is 0 everywhere: return a float "
            "or, if steps are meant, use host=True and a solver that needs no gradients."
        )
    return value


def _checked(constraints: Any, bounds: Any, host: bool) -> tuple[PyTree, PyTree]:
    """The bounds of constraints, as far as they can be checked without knowing their shape."""
    if not callable(constraints):
        raise TypeError(f"constraints is {constraints!r}: give a callable.")
    if bounds is None and not host:
        return -np.inf, 0.0
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"constraint_bounds is {bounds!r}: give a pair (lower, upper) of pytrees like the "
            "constraints."
        )
    lower, upper = bounds
    if jax.tree.structure(lower) == jax.tree.structure(upper):
        check_order(lower, upper, "constraint_bounds")
    elif host:
        raise ValueError("constraint_bounds: with host=True give two pytrees like the constraints.")
    return lower, upper


def _by_differences(jacobian: Any) -> bool:
    """Whether differences are all, or part, of a Jacobian."""
    return isinstance(jacobian, str) or getattr(jacobian, "by_differences", False)


def _check_jacobian(jacobian: Any, constraints: Any, host: bool) -> None:
    if not (callable(jacobian) or jacobian in DIFFERENCES):
        raise ValueError(
            f'constraint_jacobian is {jacobian!r}: use a callable, "2-point" or "3-point".'
        )
    if constraints is None:
        raise ValueError("constraint_jacobian is given without constraints: give both.")
    if not host:
        raise ValueError(
            f"constraint_jacobian is {jacobian!r}, but JAX differentiates these constraints: leave "
            "it out, or give host=True."
        )


def _count(limits: tuple[PyTree, PyTree] | None) -> int:
    return 0 if limits is None else sum(np.size(leaf) for leaf in jax.tree.leaves(limits[0]))


class Objective(Problem):
    """A function `fun(x) -> scalar` as a problem, with error 0.

    **Arguments:**

    - `fun`: the function; x is the pytree that `solve` starts from.
    - `gradient`: `None` differentiates `fun` by JAX; `True` says that `fun` returns
      `(value, gradient)`; a callable returns the gradient. With `host=True` also `"2-point"`:
      forward differences, and central ones where the requested accuracy needs them; or
      `"3-point"`: central differences throughout. Their error is estimated and reported.
    - `bounds`: a pair `(lower, upper)` of pytrees like x, or scalars. Differences keep within them.
    - `constraints`: `constraints(x)` returns an array of floats, or a pytree of them;
      `constraint_bounds`: the pair `(lower, upper)` that they must lie between, scalars or pytrees
      like them; where both are equal it is an equality constraint. The default is
      `constraints(x) <= 0`. With `host=True` the bounds must have the shape of the constraints,
      which are called where the value is finite.
    - `constraint_jacobian`: only with `host=True`, for solvers that need it: a callable that
      returns the matrix, a row for each constraint and a column for each variable in flat order;
      or `"2-point"` or `"3-point"`, forward or central differences of the constraints.
    - `hessian(x)`: the matrix of second derivatives over the flat x, or `hessian_product(x, v)`:
      its product with v, a pytree like x. Without them JAX differentiates, and Hessians of `host`
      functions are differences of gradients, one more gradient for every variable.
    - `host`: `fun` is Python code that JAX cannot trace; it gets NumPy arrays of its own and is
      called once a point.
    - `on_error`: what an exception of a `host` function means: `"raise"` ends the run with the best
      point attached to the error, `"fail"` marks the point as failed and goes on (the first
      exception of a run is logged, all are counted).
    - `executor`: evaluates points of a `host` function: [`Workers`][], or what these take.

    Values of lower precision than x (a float32 network called with float64 variables) get a
    `value_error` of their rounding.

    >>> import jax.numpy as jnp, tolerax
    >>> parabola = tolerax.Objective(lambda x: jnp.sum(x**2), bounds=(1.0, jnp.inf))
    >>> tolerax.solve(parabola, tolerax.InexactLineSearch(), 3 * jnp.ones(2)).x
    Array([1., 1.], dtype=float64)
    """

    fun: Callable
    gradient: Any = None
    bounds: tuple[PyTree, PyTree] | None = None
    constraints: Callable | None = None
    limits: tuple[PyTree, PyTree] | None = None
    hessian: Callable | None = None
    hessian_product: Callable | None = None
    is_host: bool = eqx.field(static=True, default=False)
    on_error: str = eqx.field(static=True, default="raise")
    # Where points are evaluated does not change what the problem is.
    executor: Workers | None = eqx.field(static=True, default=None, compare=False)
    constraint_jacobian: Any = None

    def __init__(
        self,
        fun: Callable,
        *,
        gradient: Callable | Literal[True, "2-point", "3-point"] | None = None,
        bounds: tuple[PyTree, PyTree] | None = None,
        constraints: Callable | None = None,
        constraint_bounds: tuple[PyTree, PyTree] | None = None,
        constraint_jacobian: Callable | Literal["2-point", "3-point"] | None = None,
        hessian: Callable | None = None,
        hessian_product: Callable | None = None,
        host: bool = False,
        on_error: Literal["raise", "fail"] = "raise",
        executor: Any = None,
    ):
        if not callable(fun):
            raise TypeError(f"fun is {fun!r}: give a callable.")
        if on_error not in ("raise", "fail"):
            raise ValueError(f'on_error is {on_error!r}: use "raise" or "fail".')
        if not (gradient is None or gradient is True or callable(gradient)):
            if gradient not in DIFFERENCES:
                raise ValueError(
                    f"gradient is {gradient!r}: use None, True, a callable, or, with host=True, "
                    '"2-point" or "3-point".'
                )
            if not host:
                raise ValueError(
                    f"gradient is {gradient!r}, but finite differences are for Python code: leave "
                    "gradient out to differentiate by JAX, or give host=True."
                )
        if executor is not None and not host:
            raise ValueError(
                f"executor is {executor!r}, but this objective is evaluated by compiled code: "
                "leave executor out, or give host=True."
            )
        for name, given in (("hessian", hessian), ("hessian_product", hessian_product)):
            if not (given is None or callable(given)):
                raise TypeError(f"{name} is {given!r}: give a callable.")
        if hessian is not None and hessian_product is not None:
            raise ValueError("hessian and hessian_product are given: give one of them.")
        if constraints is None and constraint_bounds is not None:
            raise ValueError("constraint_bounds are given without constraints: give both.")
        if constraints is not None:
            constraint_bounds = _checked(constraints, constraint_bounds, host)
        if constraint_jacobian is not None:
            _check_jacobian(constraint_jacobian, constraints, host)
        self.fun = fun
        self.gradient = gradient
        self.bounds = bounds
        self.constraints = constraints
        self.limits = constraint_bounds
        self.hessian = hessian
        self.hessian_product = hessian_product
        self.is_host = host
        self.on_error = on_error
        self.executor = None if executor is None else Workers.of(executor)
        self.constraint_jacobian = constraint_jacobian

    @property
    def provenance(self) -> Provenance:
        if isinstance(self.gradient, str) or _by_differences(self.constraint_jacobian):
            return Provenance((("differences", "estimated"),))
        return Provenance()

    @property
    def constraint_bounds(self) -> tuple[PyTree, PyTree] | None:
        return self.limits

    @property
    def host(self) -> bool:
        return self.is_host

    def on(self, executor: Any) -> "Objective":
        if executor is None and (self.executor is not None or not self.is_host):
            return self
        return Objective(
            self.fun,
            gradient=self.gradient,
            bounds=self.bounds,
            constraints=self.constraints,
            constraint_bounds=self.limits,
            constraint_jacobian=self.constraint_jacobian,
            hessian=self.hessian,
            hessian_product=self.hessian_product,
            host=self.is_host,
            on_error=self.on_error,  # pyright: ignore[reportArgumentType]
            executor=Workers() if executor is None else executor,
        )

    def close(self) -> None:
        if self.executor is not None:
            self.executor.release()

    def outline(self) -> "Objective":
        if not self.is_host:
            return self
        gradient = _nothing if callable(self.gradient) else self.gradient
        jacobian = self.constraint_jacobian
        if callable(jacobian):
            jacobian = "2-point" if _by_differences(jacobian) else _nothing
        return Objective(
            _nothing,
            gradient=gradient,
            bounds=self.bounds,
            constraints=None if self.constraints is None else _nothing,
            constraint_bounds=self.limits,
            constraint_jacobian=jacobian,
            hessian=None if self.hessian is None else _nothing,
            hessian_product=None if self.hessian_product is None else _nothing,
            host=True,
        )

    def evaluate(self, query: Query) -> Evaluation:
        if self.is_host:
            return _interpreted(self.outline(), query, self.observe(query))
        mask = query.mask
        if mask is None:
            return self._point(query.x, query.derivatives)
        answers = eqx.filter_vmap(lambda x: self._point(x, query.derivatives))(query.x)
        count = jnp.sum(mask)
        work = Work(points=count, values=count, gradients=count * (query.derivatives > 0))
        return eqx.tree_at(lambda e: e.work, answers, work)

    @names_host
    def _point(self, x: PyTree, derivatives: int) -> Evaluation:
        work = Work(points=1, values=1, gradients=int(derivatives > 0))
        value = lambda x: _scalar(self.fun(x))  # noqa: E731
        if self.gradient is True:
            v, g = self.fun(x)
            v, g = _scalar(v), like(g, x)
        elif derivatives == 0:
            v, g = value(x), None
        elif self.gradient is None:
            v, g = jax.value_and_grad(value)(x)
        else:
            v, g = value(x), like(self.gradient(x), x)
        # An operator holds the function itself: a closure could not leave compiled code.
        hessian = None
        if derivatives > 1:
            given = given_hessian(self.hessian, self.hessian_product, x)
            hessian = HessianOf(self.fun, x, self.gradient is True, self.constraints, given)
        evaluation = exact_evaluation(v, g if derivatives else None, work, hessian=hessian)
        error = rounding(v.dtype, jax.tree.leaves(x)[0].dtype) * jnp.abs(v)
        error = jnp.where(jnp.isfinite(v), error, 0).astype(v.dtype)
        evaluation = dataclasses.replace(evaluation, value_error=error)
        if self.constraints is None or self.limits is None:
            return evaluation
        jacobian = JacobianOf(self.constraints, x) if derivatives else None
        return constrained(evaluation, self.constraints(x), self.limits, jacobian=jacobian)

    # -- Python code ------------------------------------------------------------------------------

    def observe(self, query: Query) -> Any:
        """`Observed` at every point of the query: NumPy arrays."""
        if not self.is_host:
            return super().observe(query)
        if query.derivatives:
            _check_derivatives(self, query.derivatives)
        one = query.mask is None
        if not is_concrete((query.x, query.mask)):
            # Only the shapes are wanted.
            x = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), query.x)
            count = 1 if query.mask is None else query.mask.shape[0]
            first = x if one else jax.tree.map(lambda leaf: np.asarray(leaf[0]), x)
            return _assemble(self, [failed(first, query.derivatives)] * count, first, one)
        points, mask = points_of(query)
        gradient = self.gradient
        wanted = Wanted(
            gradient,
            query.derivatives,
            self.bounds,
            # Accuracy is a matter of differences only.
            float(np.max(np.asarray(query.accuracy.state))) if isinstance(gradient, str) else 0.0,
            self.constraints,
            _count(self.limits),
            self.hessian,
            self.hessian_product,
            self.constraint_jacobian,
        )
        workers = self.executor or Workers()
        asked = [p for p, m in zip(points, mask, strict=True) if m]
        rows = iter(workers.evaluate(self.fun, asked, wanted, self.on_error))
        skipped = failed(points[0], query.derivatives, calls=0)
        return _assemble(self, [next(rows) if m else skipped for m in mask], points[0], one)

    def interpret(self, query: Query, observed: Any) -> Evaluation:
        """What Python code answered, as an evaluation."""
        if not self.is_host:
            return super().interpret(query, observed)
        value, value_error, error = (observed.numbers[..., i] for i in range(3))
        calls, gradients = observed.counts[0], observed.counts[1]
        finite = jnp.isfinite(value) | (value == -jnp.inf)
        for leaf in jax.tree.leaves(observed.gradient):
            finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(value.ndim, leaf.ndim)))
        if observed.jacobian is not None:
            finite &= jnp.all(jnp.isfinite(observed.jacobian), axis=(-2, -1))
        zero = jnp.zeros_like(value)
        evaluation = Evaluation(
            value=value,
            value_error=value_error,
            gradient=observed.gradient,
            gradient_error=error,
            gradient_error_parts=Accuracy(error, zero),
            achieved=Accuracy(error, zero),
            work=Work(points=calls, values=calls, gradients=gradients),
            status=point_status(finite, observed.timed_out),
            provenance=self.provenance,
            hessian=None if observed.hessian is None else Matrix(observed.hessian),
        )
        if self.limits is None:
            return evaluation
        # The constraints of a point came as one vector.
        flat = observed.constraints
        leaves, structure = jax.tree.flatten(self.limits[0])
        parts = jnp.split(flat, np.cumsum([np.size(leaf) for leaf in leaves])[:-1], axis=-1)
        shapes = [flat.shape[:-1] + np.shape(leaf) for leaf in leaves]
        fitted = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        values = jax.tree.unflatten(structure, fitted)
        jacobian = None
        if observed.jacobian is not None:
            jacobian = MatrixOfConstraints(observed.jacobian, query.x, values)
        return constrained(evaluation, values, self.limits, jacobian=jacobian)


class Observed(NamedTuple):
    """What Python code gave at one point, or at each of several.

    - `numbers`: value, its error and that of the gradient; `counts`: calls and gradients in all.
    """

    numbers: Any
    counts: Any
    timed_out: Any
    gradient: PyTree
    hessian: Any
    constraints: Any
    jacobian: Any


def _check_derivatives(problem: Objective, derivatives: int) -> None:
    without = problem.hessian is None and problem.hessian_product is None
    if derivatives > 1 and without and isinstance(problem.gradient, str):
        raise TypeError(
            "this solver needs Hessian products, and differences of values do not give them: "
            "give `gradient` (`jac`), `hessian` (`hess`) or `hessian_product` (`hessp`)."
        )
    if derivatives and problem.gradient is None:
        raise TypeError(
            "this solver needs gradients and JAX cannot differentiate Python code: give "
            '`gradient` (`jac` of `minimize`): a callable, True, or "2-point" for finite '
            "differences."
        )
    if derivatives and problem.constraints is not None and problem.constraint_jacobian is None:
        raise TypeError(
            "this solver needs derivatives of the constraints and JAX cannot differentiate Python "
            'code: give `constraint_jacobian`: a callable, or "2-point" or "3-point" for finite '
            "differences."
        )


def _assemble(problem: Objective, rows: list[Row], x: PyTree, one: bool) -> Observed:
    dtype = jax.tree.leaves(x)[0].dtype

    def column(entries: list) -> Any:
        stacked = np.asarray(entries, dtype)
        return stacked[0] if one else stacked

    gradient, gradients = None, 0
    if rows[0].gradient is not None:
        gradient = jax.tree.map(lambda *g: column(list(g)), *[row.gradient for row in rows])
        gradients = sum(row.calls > 0 for row in rows)
    hessian = None
    if rows[0].hessian is not None:
        hessian = column([row.hessian for row in rows])
        if problem.hessian is None and problem.hessian_product is None:
            gradients *= 1 + sum(np.size(leaf) for leaf in jax.tree.leaves(x))
    constraints = jacobian = None
    if problem.limits is not None:
        nothing = np.full(_count(problem.limits), np.nan)
        constraints = column(
            [nothing if row.constraints is None else row.constraints for row in rows]
        )
        if gradient is not None:
            size = sum(np.size(leaf) for leaf in jax.tree.leaves(x))
            unknown = np.full((nothing.size, size), np.nan)
            jacobian = column([unknown if row.jacobian is None else row.jacobian for row in rows])
    return Observed(
        column([(row.value, row.value_error, row.gradient_error) for row in rows]),
        np.asarray((sum(row.calls for row in rows), gradients)),
        np.asarray([row.outcome == "timed_out" for row in rows])[0 if one else slice(None)],
        gradient,
        hessian,
        constraints,
        jacobian,
    )


@eqx.filter_jit
def _interpreted(outline: Objective, query: Query, observed: Observed) -> Evaluation:
    return outline.interpret(query, observed)
