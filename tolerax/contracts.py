"""The contract between problems and solvers: what is asked, what is answered.

A solver never sees a problem. It returns a [`Query`][] (where, what, how accurately), the driver
has the problem answer with an [`Evaluation`][], and the solver is told the answer:

    query = solver.ask(state)
    evaluation = problem.evaluate(query)
    state = solver.tell(state, query, evaluation)
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax._quantities import Accuracy, Provenance, Work
from tolerax.status import PointStatus, Status, is_failed
from tolerax.validation import bounds_like

State = Any


class LinearMap(Protocol):
    """An operator of an evaluation, for instance the Hessian: an Equinox module with `mv`, and with
    `rmv` (products with the transpose) where it is a Jacobian.

    Everything that changes from answer to answer is an array field, never a closure: so operators
    can be returned from compiled code, kept in the state of a solver, and never recompile.
    """

    def mv(self, vector: PyTree, /) -> PyTree: ...


class Product(eqx.Module):
    """A product with an operator that is itself a computation.

    - `vector`: the product. `error`: bound on what the linear solves within left of it, in the
      units of `Evaluation.gradient_error`. `work`: what they took.
    """

    vector: PyTree[Float[Array, "..."]]
    error: Float[Array, ""]
    work: Work


def product(operator: Any, vector: PyTree, tolerance: ArrayLike) -> Product:
    """The product of an operator of an evaluation with a vector.

    - `tolerance`: relative, on every linear solve within: the third tolerance beside those of state
      and adjoint, from which it inherits nothing. Operators that have a method `product(vector,
      tolerance)` are given it; others are exact and count as one Hessian product.

    >>> import jax.numpy as jnp, tolerax
    >>> query = tolerax.Query(jnp.ones(2), tolerax.Accuracy(1.0, 1.0), derivatives=2)
    >>> hessian = tolerax.Objective(lambda x: jnp.sum(x**3)).evaluate(query).hessian
    >>> product(hessian, jnp.array([1.0, 0.0]), 0.1).vector
    Array([6., 0.], dtype=float64)
    """
    if hasattr(operator, "product"):
        return operator.product(vector, tolerance)
    zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(vector)))
    return Product(operator.mv(vector), zero, Work(hessian_products=1))


class Query(eqx.Module):
    """What a solver asks.

    - `x`: one point, or a batch with a leading axis on every leaf when `mask` is given.
    - `accuracy`: the requested tolerances.
    - `carry`: the warm start, taken from an earlier evaluation; `None` starts cold.
    - `mask`: shape `(n,)`; points where it is false need not be evaluated.
    - `derivatives`: 0 asks for values, 1 for gradients too, 2 for Hessian (and Jacobian)
      operators too. Static.
    - `cutoff`: a point whose value is certainly above this is hopeless, and the evaluation may stop
      there: its value stays a true bound, its gradient may be as inaccurate as `gradient_error`
      says. `None` for no cutoff.
    - `effort`: after about this much work (`Work.units`) the evaluation may stop where it is, with
      bounds that are true, and `PointStatus.inaccurate` if its state is not solved. `None` for no
      limit.
    - `first_only`: of a batch, derivatives are wanted at the first point only; operators are those
      of that point, and other gradients are NaN. Static.
    - `sharding`: over which devices the points of a batch are spread; each evaluates what it holds
      in blocks of fixed size. Static.
    """

    x: PyTree[Float[Array, "..."]]
    accuracy: Accuracy
    carry: PyTree = None
    mask: Bool[Array, " n"] | None = None
    derivatives: int = eqx.field(static=True, default=1)
    cutoff: Float[Array, ""] | None = None
    effort: Int[Array, ""] | None = None
    first_only: bool = eqx.field(static=True, default=False)
    sharding: NamedSharding | None = eqx.field(static=True, default=None)


class Evaluation(eqx.Module):
    """What a problem answers. For a batch every array has a leading axis, but `work` is the total.

    - `value`, `value_error`: the truth lies in `value +- value_error`.
    - `gradient`, `gradient_error`: the true gradient lies within `gradient_error`, in the dual norm
      of `metric` (Euclidean without one); `gradient_error_parts` says how much of it comes from the
      state and from the adjoint, so that a solver tightens what dominates.
    - `achieved`: the errors achieved in state and adjoint, in the units of the request.
    - `metric`: the inner product in which x is to be measured, a [`Metric`][]; `None`: the
      Euclidean one. Steps have its norm, gradients the dual one.
    - `hessian`: an operator with `mv`, at this point; where a product takes linear solves, also
      with `product(vector, tolerance)` (see `tolerax.contracts.product`), and where the problem has
      one, with `gauss_newton()`, the positive semidefinite part. With constraints,
      `mv(vector, multipliers)` is a product with the Hessian of `value + <multipliers,
      constraints>`.
    - `constraints`: constraint values, a pytree like `Problem.constraint_bounds`; `jacobian`: their
      Jacobian operator, with `mv` and `rmv`, where gradients are asked for; `violation`: the
      largest amount by which one is out of its bounds (0 when feasible).
    - `residuals`: r, where `value` is `|r|^2 / 2`; sums of squares give them whatever is asked.
      `residuals_jacobian`: their Jacobian operator, with `mv` and `rmv`.
    - `preconditioner`: where all constraints are equalities, `mv(a, b)` with pytrees like x and
      like the constraints: symmetric, positive definite, block-diagonal, close to the inverse of
      the absolute value of the optimality system. Its inverse is the norm of residuals. `work`:
      what one product costs.
    - `carry`: the warm start for the next query near this point.
    - `work`, `status`, `provenance`: cost, outcome, and the origin of constants.
    """

    value: Float[Array, "*batch"]
    value_error: Float[Array, "*batch"]
    gradient: PyTree[Float[Array, "..."]] | None
    gradient_error: Float[Array, "*batch"]
    gradient_error_parts: Accuracy
    achieved: Accuracy
    work: Work
    status: Any
    carry: PyTree = None
    metric: Any = None
    hessian: Any = None
    constraints: PyTree = None
    jacobian: Any = None
    residuals: PyTree = None
    residuals_jacobian: Any = None
    preconditioner: Any = None
    violation: Float[Array, "*batch"] | None = None
    provenance: Provenance = Provenance()


def exact_evaluation(
    value: Float[Array, "*batch"],
    gradient: PyTree[Float[Array, "..."]] | None,
    work: Work,
    *,
    hessian: Any = None,
    status: Any = None,
) -> Evaluation:
    """An evaluation without error, marked failed where value or gradient is not finite.

    `-inf` is a value (the problem is unbounded); `+inf` and NaN are failures.
    """
    zero = jnp.zeros_like(value)
    finite = jnp.isfinite(value) | (value == -jnp.inf)
    if gradient is not None and value.ndim == 0:
        finite = finite & tree_all_finite(gradient)
    if status is None:
        outcome = lambda one: PointStatus.where(one, PointStatus.ok, PointStatus.failed)  # noqa: E731
        status = jax.vmap(outcome)(finite) if finite.ndim else outcome(finite)
    return Evaluation(
        value=value,
        value_error=zero,
        gradient=gradient,
        gradient_error=zero,
        gradient_error_parts=Accuracy(zero, zero),
        achieved=Accuracy(zero, zero),
        work=work,
        status=status,
        hessian=hessian,
    )


class Problem(eqx.Module):
    """A problem answers queries. Subclasses give `evaluate`; `bounds` are a pair of pytrees like x
    (or scalars) or `None`. Problems whose evaluation is Python code set `host = True`."""

    bounds: eqx.AbstractVar[tuple[PyTree, PyTree] | None]

    @abc.abstractmethod
    def evaluate(self, query: Query) -> Evaluation:
        """Answer one query; failed points are marked in `status`, never raised."""

    def observe(self, query: Query) -> PyTree:
        """The part of `evaluate` that is Python code: arrays for `interpret`."""
        return self.evaluate(query)

    def interpret(self, query: Query, observed: PyTree) -> Evaluation:
        """The answer that was observed. This part is compiled together with the solver; it is
        called on the `outline` of the problem."""
        del query
        return observed

    @property
    def constraint_bounds(self) -> tuple[PyTree, PyTree] | None:
        """A pair `(lower, upper)` for the constraints of its evaluations, scalars or pytrees like
        them; where both are equal it is an equality constraint. `None`: there are none."""
        return None

    def cold_start(self) -> PyTree:
        """The carry of a cold start: its structure is that of every `Evaluation.carry`."""
        return None

    @property
    def provenance(self) -> Provenance:
        """Where the constants of the error bounds come from; the default is an exact problem."""
        return Provenance()

    def on(self, executor: Any) -> "Problem":
        """This problem as a run evaluates it: on an executor (`submit(fn, *args)`) unless that is
        `None`."""
        if executor is None:
            return self
        raise ValueError(
            f"executor is {executor!r}, but {type(self).__name__} is evaluated by compiled code: "
            "leave executor out, or use `Objective(fun, host=True)`."
        )

    def close(self) -> None:
        """Let go of what evaluations hold (workers, files): `solve` calls this when it ends."""

    def outline(self) -> "Problem":
        """This problem as far as the shapes of its answers go: a run is begun with it. Python code
        is left out, so that the next function does not compile again."""
        return self

    @property
    def host(self) -> bool:
        """Whether `evaluate` runs Python code and cannot be compiled."""
        return False


class Start:
    """What a solver is given to begin with.

    - `x`: the start point; `bounds`: pair of pytrees like x, or `None`; `constraint_bounds`: pair
      of pytrees like the constraints, or `None`.
    - `carry`: the warm start of a cold start; `key`: a random key.
    - `answer(query)`: the shapes of the evaluation that a query would get, for solvers that have to
      reserve space for parts of it.
    """

    def __init__(
        self,
        x: PyTree,
        bounds: tuple[PyTree, PyTree] | None,
        carry: PyTree,
        key: PRNGKeyArray,
        answer: Callable[[Query], PyTree],
        constraint_bounds: tuple[PyTree, PyTree] | None = None,
    ):
        self.x = x
        self.bounds = bounds
        self.constraint_bounds = constraint_bounds
        self.carry = carry
        self.key = key
        self.answer = answer


class Solver(eqx.Module):
    """A solver is immutable configuration; what evolves lives in a state (a pytree of arrays).

    Four methods make a solver. Five more have defaults: `check` looks at options and start before
    anything is compiled, `verify` re-checks the stopping criterion on a fresh evaluation of the
    returned point, `work` counts what `tell` did with operators, `record` names scalars for the
    history, `by_gradients` does without second derivatives.
    """

    @abc.abstractmethod
    def init(self, start: Start) -> State:
        """The first state."""

    @abc.abstractmethod
    def ask(self, state: State) -> Query:
        """What to evaluate next."""

    @abc.abstractmethod
    def tell(self, state: State, query: Query, evaluation: Evaluation) -> State:
        """The state after an answer.

        The `query` is what was evaluated. It is not always what `ask` returned: points that a
        budget no longer allows are masked out of a batch.
        """

    @abc.abstractmethod
    def terminate(self, state: State) -> tuple[Bool[Array, ""], Any]:
        """Whether the run is over, and with which `Status`."""

    def check(self, x0: PyTree) -> None:
        """Raise for options that do not fit the start, warn of options that will not work. Called
        once a run, on the host unless the whole run is compiled."""
        del x0

    def verify(self, state: State, evaluation: Evaluation) -> Bool[Array, ""]:
        """Whether the stopping criterion holds for a fresh evaluation of the returned point (always
        that of one point, also for solvers that ask for batches)."""
        del state, evaluation
        return jnp.array(True)

    def work(self, state: State) -> Work:
        """What the solver has spent itself, on products with operators of evaluations, since its
        first state. The driver adds it to the work of the evaluations."""
        del state
        return Work()

    def record(self, state: State) -> dict[str, Array]:
        """Scalars of the state that the history keeps, by name."""
        del state
        return {}

    def by_gradients(self) -> "Solver":
        """This solver for problems without second derivatives (Python code): `solve` takes it in
        place of the solver there."""
        return self

    def larger(self, factor: int) -> "Solver":
        """This solver with a population so many times as large, for a restart; the solver itself
        where it has none."""
        del factor
        return self

    @property
    def honours_bounds(self) -> bool:
        """Whether every point that `ask` returns lies within the bounds."""
        return False

    @property
    def uses_hessian(self) -> bool:
        """Whether it asks for second derivatives."""
        return False

    @property
    def honours_constraints(self) -> bool:
        """Whether it looks at `violation` (and `constraints`)."""
        return False

    @property
    def feasibility(self) -> ArrayLike:
        """The largest `violation` of a point that counts as feasible. A solver of problems with
        constraints gives its tolerance, and claims success when told about the point it means."""
        return 0.0


def constrained(
    evaluation: Evaluation,
    constraints: PyTree[Float[Array, "..."]],
    bounds: tuple[PyTree, PyTree],
    *,
    jacobian: Any = None,
) -> Evaluation:
    """An evaluation with constraint values and their `violation`, marked failed where one is not
    finite. For a batch the constraints have its leading axis.

    - `bounds`: pair of pytrees like the constraints at one point, or scalars.
    """
    value = evaluation.value
    one = jax.tree.map(lambda c: jax.ShapeDtypeStruct(c.shape[value.ndim :], c.dtype), constraints)
    lower, upper = bounds_like(bounds, one, name="constraint_bounds", of="the constraints")
    violation, finite = jnp.zeros_like(value), jnp.ones(value.shape, bool)
    for c, low, high in zip(*map(jax.tree.leaves, (constraints, lower, upper)), strict=True):
        axes = tuple(range(value.ndim, c.ndim))
        shape = (1,) * value.ndim + low.shape
        low, high = low.reshape(shape), high.reshape(shape)
        out = jnp.maximum(jnp.maximum(low - c, c - high), 0)
        violation = jnp.maximum(violation, jnp.max(out, axis=axes, initial=0).astype(value.dtype))
        finite &= jnp.all(jnp.isfinite(c), axis=axes)
    spread = lambda flag: jnp.broadcast_to(flag, finite.shape)  # noqa: E731
    where = jax.vmap(PointStatus.where) if finite.ndim else PointStatus.where
    failed = jax.tree.map(spread, PointStatus.failed)
    return dataclasses.replace(
        evaluation,
        constraints=constraints,
        jacobian=jacobian,
        violation=jnp.where(finite, violation, jnp.inf),
        status=where(finite | is_failed(evaluation.status), evaluation.status, failed),
    )


def tree_all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every leaf is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


__all__ = [
    "Accuracy",
    "Evaluation",
    "LinearMap",
    "Problem",
    "Product",
    "Provenance",
    "Query",
    "Solver",
    "Start",
    "Status",
    "Work",
    "constrained",
    "exact_evaluation",
    "product",
    "tree_all_finite",
]
