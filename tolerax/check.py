"""Taylor tests: is the gradient of a problem that of its values, and if not, which derivative of
which function is wrong?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Problem, Query
from tolerax.problems.full_space import FullSpace
from tolerax.problems.implicit import Implicit
from tolerax.problems.time_dependent import TimeDependent

# Central differences of these lengths: the best one is right to about eps^(2/3).
STEPS = 10.0 ** np.arange(-1, -7, -1)


@dataclasses.dataclass(frozen=True)
class Block:
    """One derivative that was compared with differences.

    - `name`: which one. `error`: the smallest relative difference from central differences over all
      steps. `slope`: the rate at which the remainder of first order falls with the step, 2 for a
      right derivative and 1 for a wrong one; NaN where there is no remainder to speak of.
    - `passed`: whether the error is explained by rounding, curvature and the errors of values.
    """

    name: str
    error: float
    slope: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """What [`check_gradient`][] found: a [`Block`][] for each derivative. Printed it is a table."""

    blocks: tuple[Block, ...]

    @property
    def passed(self) -> bool:
        """Whether every derivative passed."""
        return all(block.passed for block in self.blocks)

    @property
    def wrong(self) -> tuple[str, ...]:
        """The names of those that did not."""
        return tuple(block.name for block in self.blocks if not block.passed)

    def __str__(self) -> str:
        width = max(len(block.name) for block in self.blocks)
        lines = [f"{'derivative':{width}}  error    slope"]
        for b in self.blocks:
            mark = "" if b.passed else "  WRONG"
            lines.append(f"{b.name:{width}}  {b.error:.1e}  {b.slope:4.2f}{mark}")
        return "\n".join(lines)


def check_gradient(
    problem: Problem,
    x: PyTree,
    *,
    accuracy: Accuracy | None = None,
    hessian: bool = False,
    key: PRNGKeyArray | None = None,
) -> GradientCheck:
    """Compare the derivatives of a problem with differences at x, along a random direction of each
    leaf of x.

    The functions that a problem is made of are differentiated one by one as well, so that a wrong
    custom derivative is named and not only noticed: cost and residual (or potential) of a nested
    problem at its state, vector field and costs of a [`TimeDependent`][] one at the start of its
    trajectory. Constraints are compared with products with their Jacobian.

    - `accuracy`: of values and gradients; the default is 1e-10 for both.
    - `hessian`: whether to compare Hessian products with differences of gradients as well.

    >>> import jax.numpy as jnp, tolerax
    >>> wrong = tolerax.Objective(lambda x: jnp.sum(x**2), gradient=lambda x: 3 * x)
    >>> print(tolerax.check_gradient(wrong, jnp.ones(2)))
    derivative     error    slope
    gradient in x  ...      1.0...  WRONG
    """
    key = jax.random.key(0) if key is None else key
    tolerances = Accuracy(1e-10, 1e-10) if accuracy is None else accuracy
    order = 2 if hessian else 1
    inner = getattr(problem, "oracle", problem)
    carry = problem.cold_start()

    def answer(x: PyTree, carry: PyTree = carry) -> Any:
        return problem.evaluate(Query(x, tolerances, carry, derivatives=order))

    evaluate = answer if problem.host else eqx.filter_jit(answer)
    centre = evaluate(x)
    noise, eps = float(centre.value_error), _precision(centre.value)
    blocks = []
    for name, function, points in _parts(inner, x, tolerances):
        for i, (variable, at) in enumerate(points):

            def alone(z: PyTree, f: Callable = function, i: int = i, points: Any = points) -> Any:
                return f(*(z if j == i else point for j, (_, point) in enumerate(points)))

            blocks += _function(f"{name} in {variable}", alone, at, key)

    for label, v in _directions("gradient in x", x, key):
        slope = _dot(centre.gradient, v)
        value = lambda h, v=v: float(evaluate(_moved(x, h, v), centre.carry).value)  # noqa: E731
        blocks.append(_compared(label, value, float(slope), noise, eps))
    if centre.constraints is not None and centre.jacobian is not None:
        weights = _random(jax.random.fold_in(key, 3), centre.constraints)
        for label, v in _directions("constraints in x", x, key):
            product = float(_dot(weights, centre.jacobian.mv(v)))

            def rows(h: float, v: PyTree = v) -> float:
                return float(_dot(weights, evaluate(_moved(x, h, v), centre.carry).constraints))

            blocks.append(_compared(label, rows, product, noise, eps))
    if hessian and centre.hessian is not None:
        weights = _random(jax.random.fold_in(key, 1), x)
        for label, v in _directions("Hessian in x", x, key):
            product = float(_dot(weights, centre.hessian.mv(v)))

            def along(h: float, v: PyTree = v) -> float:
                return float(_dot(weights, evaluate(_moved(x, h, v), centre.carry).gradient))

            size = float(jnp.sqrt(_dot(weights, weights)))
            error = float(centre.gradient_error) * size
            blocks.append(_compared(label, along, product, error, eps))
    return GradientCheck(tuple(blocks))


def _function(name: str, function: Callable, at: PyTree, key: PRNGKeyArray) -> list[Block]:
    """A function of one argument: its derivative along each leaf, weighted at random."""
    images = jax.eval_shape(function, at)
    weights = _random(jax.random.fold_in(key, 2), images)
    scalar = jax.jit(lambda z: _dot(weights, function(z)))
    blocks = []
    for label, v in _directions(name, at, key):
        derivative = float(jax.jvp(scalar, (at,), (v,))[1])
        value = lambda h, v=v: float(scalar(_moved(at, h, v)))  # noqa: E731
        blocks.append(_compared(label, value, derivative, 0.0, _precision(images)))
    return blocks


def _parts(
    problem: Problem, x: PyTree, tolerances: Accuracy
) -> list[tuple[str, Callable, list[tuple[str, PyTree]]]]:
    """The functions that a problem is made of, with the names and values of their arguments. The
    state is y; what a solver moves is x."""
    if isinstance(problem, Implicit):
        state = problem.solve_state(x, tolerances.state)[0]
        functions = [("cost", problem.cost)]
        if problem.residual is not None:
            functions.append(("residual", problem.residual))
        if problem.potential is not None:
            functions += [("potential", problem.potential), ("F", jax.grad(problem.potential))]
        return [(name, function, [("y", state), ("x", x)]) for name, function in functions]
    if isinstance(problem, FullSpace):
        points = [("y", x[0]), ("u", x[1])]
        return [("cost", problem.cost, points), ("residual", problem.residual, points)]
    if isinstance(problem, TimeDependent):
        t, y = problem.times[0], problem.start(x)
        found: list = []
        for name in ("vector_field", "running_cost"):
            function = getattr(problem, name)
            if function is not None:
                at_start = lambda y, u, f=function: f(t, y, u)  # noqa: E731
                found.append((name, at_start, [("y", y), ("u", problem.control(x))]))
        if problem.cost is not None:
            found.append(("cost", problem.cost, [("y", y), ("x", x)]))
        return found
    return []


def _precision(tree: PyTree) -> float:
    """The rounding of numbers like these."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(tree))


def _compared(
    name: str, value: Callable[[float], float], slope: float, noise: float, eps: float
) -> Block:
    """A derivative `slope` against differences of `value(h)`, known to within `noise` and computed
    to a precision of `eps`."""
    at_zero = value(0.0)
    ahead = np.array([value(h) for h in STEPS])
    behind = np.array([value(-h) for h in STEPS])
    central = (ahead - behind) / (2 * STEPS)
    rounding = 4 * eps * np.maximum(np.abs(ahead), np.abs(behind)) + 2 * noise
    size = max(abs(slope), np.min(np.abs(central)), np.finfo(float).tiny)
    errors = np.abs(central - slope)
    usable = np.isfinite(errors)
    # How far differences are from each other says how far they are from the derivative: nothing but
    # that, and what rounding makes of a derivative, may be between them.
    apart = np.abs(np.diff(central))
    unsure = np.maximum(np.append(apart, apart[-1]), np.insert(apart, 0, apart[0]))
    unsure = np.where(usable & np.isfinite(unsure), unsure + rounding / STEPS, np.inf)
    best = int(np.argmin(unsure))
    exact = max(1e-9, 100 * eps)
    passed = bool(usable[best] and errors[best] <= 10 * unsure[best] + exact * size)
    remainder = np.abs(ahead - at_zero - STEPS * slope)
    # Where the remainder is more than rounding, its rate.
    clear = np.isfinite(remainder) & (remainder > np.maximum(100 * rounding, 1e-9 * STEPS * size))
    rate = np.nan
    if np.sum(clear) >= 2:
        rate = float(np.polyfit(np.log(STEPS[clear]), np.log(remainder[clear]), 1)[0])
    size = max(size, 1e6 * float(rounding[0]))
    error = float(np.min(errors[usable]) / size) if np.any(usable) else np.inf
    return Block(name, error, rate, passed)


def _directions(name: str, x: PyTree, key: PRNGKeyArray) -> list[tuple[str, PyTree]]:
    """A random unit direction for each leaf, and what it is called."""
    leaves, structure = jax.tree.flatten(x)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]
    found = []
    for i, path in enumerate(paths):
        direction = _random(jax.random.fold_in(key, i), leaves[i])
        direction = direction / jnp.maximum(jnp.linalg.norm(direction.ravel()), 1e-300)
        parts = [direction if j == i else jnp.zeros_like(leaf) for j, leaf in enumerate(leaves)]
        found.append((name + path, jax.tree.unflatten(structure, parts)))
    return found


def _random(key: PRNGKeyArray, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, jnp.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def _moved(x: PyTree, h: float, v: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, d: leaf + h * d, x, v)


def _dot(a: PyTree, b: PyTree) -> Any:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))
