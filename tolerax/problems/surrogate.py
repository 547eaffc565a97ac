"""Optimization over a trained network: `f(Phi(x), x)` where Phi is a network."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Evaluation, Problem, Query, Work, constrained, exact_evaluation
from tolerax.problems.hessians import JacobianOf
from tolerax.problems.objective import HessianOf
from tolerax.problems.onnx import read_onnx
from tolerax.validation import check_order


class Prediction(eqx.Module):
    """What the networks say at x: their mean, and how far they are apart."""

    networks: tuple[Callable, ...]

    def __call__(self, x: PyTree) -> PyTree:
        outputs = [_called(network, x) for network in self.networks]
        if len(outputs) == 1:
            return outputs[0]
        return jax.tree.map(lambda *z: sum(z) / len(z), *outputs)

    def disagreement(self, x: PyTree) -> Float[Array, ""]:
        """Root mean square, over outputs and networks, of the distance from the mean."""
        flat = jnp.stack([ravel_pytree(_called(network, x))[0] for network in self.networks])
        # The root of 0 has no derivative; a network agrees with itself up to rounding.
        tiny = jnp.finfo(flat.dtype).tiny
        return jnp.sqrt(jnp.maximum(jnp.mean(jnp.var(flat, axis=0)), tiny))


class Goal(eqx.Module):
    """The minimized function of x."""

    prediction: Prediction
    objective: Callable
    sign: int = eqx.field(static=True)

    def of(self, z: PyTree, x: PyTree) -> Float[Array, ""]:
        """The value where the prediction is z."""
        value = jnp.asarray(self.objective(z, x))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"the objective returned {value.dtype}{list(value.shape)}: it must return a float "
                "scalar."
            )
        return self.sign * value

    def __call__(self, x: PyTree) -> Float[Array, ""]:
        return self.of(self.prediction(x), x)


class Limits(eqx.Module):
    """The constraints as a function of x."""

    prediction: Prediction
    constraints: Callable | None
    guarded: bool = eqx.field(static=True)

    def of(self, z: PyTree, x: PyTree) -> PyTree[Float[Array, "..."]]:
        """The constraints of the user where the prediction is z."""
        dtype = jax.tree.leaves(x)[0].dtype
        values = () if self.constraints is None else self.constraints(z, x)
        return jax.tree.map(lambda c: jnp.asarray(c, dtype), values)

    def at(self, z: PyTree, x: PyTree) -> dict[str, PyTree[Float[Array, "..."]]]:
        """All constraints at x, where the prediction is z."""
        values = {} if self.constraints is None else {"constraints": self.of(z, x)}
        if self.guarded:
            apart = self.prediction.disagreement(x)
            values["disagreement"] = apart.astype(jax.tree.leaves(x)[0].dtype)
        return values

    def __call__(self, x: PyTree) -> dict[str, PyTree[Float[Array, "..."]]]:
        return self.at(self.prediction(x), x)


class Recheck(NamedTuple):
    """What the simulator says at a point, beside what the networks say there.

    - `value`, `predicted_value`: the objective (as given, whatever `maximize`);
    - `violation`: the largest violation of the constraints by the simulator's output, 0 if none;
    - `output_error`: largest difference of the outputs.
    """

    value: float
    predicted_value: float
    violation: float
    output_error: float


class NeuralSurrogate(Problem):
    """Minimize (or maximize) `objective(z, x)` subject to constraints on `z`, where `z = Phi(x)` is
    the output of a trained network.

    A network is believed only where it was trained: `trust` keeps x within the box of the training
    data, and several networks trained on the same data are believed where they agree. `recheck`
    asks the simulator that the network stands for.

    **Arguments:**

    - `network`: a callable x -> z, for instance an Equinox module (in inference mode), or the path
      of an ONNX file (see [`read_onnx`][]); or a list of these, whose mean is z. Arrays that a
      callable captures instead of holding them are compiled in. NumPy or torch code has to be
      wrapped in `jax.pure_callback`, and is for solvers that need no gradients.
    - `objective(z, x)`: a scalar.
    - `constraints(z, x)`: an array or a pytree of them; `constraint_bounds`: pair `(lower, upper)`
      of what they must lie between, scalars or pytrees like them. The default is
      `constraints(z, x) <= 0`.
    - `maximize`: whether the objective is to be maximized. Then values and gradients that solvers
      see, and that a `Solution` holds, are those of `-objective`.
    - `bounds`, `trust`: pairs of pytrees like x, or scalars: what x may be, and where the network
      is believed. x stays within both.
    - `max_disagreement`: of several networks: the largest root mean square distance of their
      outputs from the mean, as one more constraint.
    - `simulator`: what the network stands for, a Python callable x -> z.

    Networks whose output is of lower precision than x (float16, float32) get a `value_error` of
    their rounding, to first order. A forward pass counts as one of `network_passes`, and so does a
    backward pass.

    >>> import equinox as eqx, jax, jax.numpy as jnp, tolerax
    >>> network = eqx.nn.MLP(2, 1, 16, 2, jnp.tanh, key=jax.random.key(0))
    >>> problem = tolerax.NeuralSurrogate(
    ...     network, lambda z, x: z[0], maximize=True, trust=(-1.0, 1.0)
    ... )
    >>> solution = tolerax.solve(problem, tolerax.InexactLineSearch(), jnp.zeros(2))
    >>> float(network(solution.x)[0]) > float(network(jnp.zeros(2))[0])
    True
    """

    goal: Goal
    limits: Limits
    within: PyTree
    bounds: tuple[PyTree, PyTree] | None
    simulator: Callable | None = eqx.field(static=True)

    def __init__(
        self,
        network: Callable | str | os.PathLike[str] | Sequence[Any],
        objective: Callable[[PyTree, PyTree], Float[Array, ""]],
        *,
        constraints: Callable[[PyTree, PyTree], PyTree] | None = None,
        constraint_bounds: tuple[PyTree, PyTree] | None = None,
        maximize: bool = False,
        bounds: tuple[PyTree, PyTree] | None = None,
        trust: tuple[PyTree, PyTree] | None = None,
        max_disagreement: float | None = None,
        simulator: Callable[[PyTree], PyTree] | None = None,
    ):
        networks = _read(network)
        if not networks or not all(map(callable, networks)):
            raise TypeError(f"network is {network!r}: give a callable or a list of callables.")
        if max_disagreement is not None and (len(networks) == 1 or not max_disagreement > 0):
            raise ValueError(
                f"max_disagreement is {max_disagreement!r} with {len(networks)} network(s): give a "
                "positive number, and several networks."
            )
        if constraints is None and constraint_bounds is not None:
            raise ValueError("constraint_bounds are given without constraints: give both.")
        prediction = Prediction(networks)
        self.goal = Goal(prediction, objective, -1 if maximize else 1)
        self.limits = Limits(prediction, constraints, max_disagreement is not None)
        lower, upper = {}, {}
        if constraints is not None:
            given = (-np.inf, 0.0) if constraint_bounds is None else constraint_bounds
            lower["constraints"], upper["constraints"] = given
        if max_disagreement is not None:
            lower["disagreement"], upper["disagreement"] = -np.inf, float(max_disagreement)
        self.within = (lower, upper)
        self.bounds = _both(bounds, trust)
        self.simulator = simulator

    @property
    def constraint_bounds(self) -> tuple[PyTree, PyTree] | None:
        return self.within if self.within[0] else None

    def evaluate(self, query: Query) -> Evaluation:
        mask = query.mask
        if mask is None:
            return self._point(query.x, query.derivatives)
        answers = eqx.filter_vmap(lambda x: self._point(x, query.derivatives))(query.x)
        total = jax.tree.map(lambda n: jnp.sum(jnp.where(mask, n, 0)), answers.work)
        return eqx.tree_at(lambda e: e.work, answers, total)

    def _point(self, x: PyTree, derivatives: int) -> Evaluation:
        networks = len(self.goal.prediction.networks)
        gradient = hessian = None
        if derivatives:
            z, pullback = _pulled_back(self.goal.prediction, x)
            value, (by_z, by_x) = jax.value_and_grad(self.goal.of, (0, 1))(z, x)
            gradient = jax.tree.map(jnp.add, pullback(by_z)[0], by_x)
        else:
            z = self.goal.prediction(x)
            value, by_z = self.goal.of(z, x), None
        if derivatives > 1:
            hessian = HessianOf(self.goal, x, constraints=self.limits)
        dtype = jax.tree.leaves(x)[0].dtype
        passes = networks * (1 + (derivatives > 0))
        work = Work(points=1, values=1, gradients=int(derivatives > 0), network_passes=passes)
        answer = exact_evaluation(value.astype(dtype), gradient, work, hessian=hessian)
        answer = eqx.tree_at(
            lambda e: e.value_error, answer, self._rounding(z, x, value, by_z).astype(dtype)
        )
        if self.constraint_bounds is None:
            return answer
        jacobian = JacobianOf(self.limits, x) if derivatives else None
        return constrained(answer, self.limits.at(z, x), self.constraint_bounds, jacobian=jacobian)

    def _rounding(self, z: PyTree, x: PyTree, value: Array, by_z: PyTree | None) -> Array:
        """First-order effect on the value of rounding in outputs of lower precision than x."""
        precision = jnp.finfo(jax.tree.leaves(x)[0].dtype).eps
        coarse = [jnp.finfo(leaf.dtype).eps > precision for leaf in jax.tree.leaves(z)]
        if not any(coarse):
            return jnp.zeros_like(value)
        if by_z is None:
            by_z = jax.grad(self.goal.of)(z, x)
        parts = [
            jnp.finfo(leaf.dtype).eps * jnp.sum(jnp.abs(leaf * slope).astype(value.dtype))
            for leaf, slope, low in zip(
                jax.tree.leaves(z), jax.tree.leaves(by_z), coarse, strict=True
            )
            if low
        ]
        own = jnp.finfo(value.dtype).eps
        error = sum(parts, (own if own > precision else 0.0) * jnp.abs(value))
        return jnp.where(jnp.isfinite(value), error, 0)

    def recheck(self, x: PyTree) -> Recheck:
        """Evaluate the simulator at x, one point, and compare: an optimum of the networks alone may
        be an error of theirs. Raises ValueError without a simulator, or where it raises or has no
        finite output."""
        if self.simulator is None:
            raise ValueError("there is no simulator to ask: give `simulator` to NeuralSurrogate.")
        try:
            answer = self.simulator(jax.tree.map(np.asarray, x))
        except Exception as error:
            raise ValueError(f"the simulator raised {error!r} at x = {x}.") from error
        truth = jax.tree.map(jnp.asarray, answer)
        predicted = self.goal.prediction(x)
        if jax.tree.map(jnp.shape, truth) != jax.tree.map(jnp.shape, predicted):
            raise ValueError(
                f"the simulator returned shapes {jax.tree.map(jnp.shape, truth)}, the network "
                f"{jax.tree.map(jnp.shape, predicted)}: they must be the same."
            )
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(truth)):
            raise ValueError(
                f"the simulator returned {answer!r} at x = {x}, which is not finite: what the "
                "networks say there is not confirmed."
            )
        gaps = [
            float(jnp.max(jnp.abs(t - p), initial=0.0))
            for t, p in zip(jax.tree.leaves(truth), jax.tree.leaves(predicted), strict=True)
        ]
        violation = 0.0
        if self.limits.constraints is not None:
            lower, upper = (side["constraints"] for side in self.within)
            nothing = exact_evaluation(jnp.zeros(()), None, Work())
            checked = constrained(nothing, self.limits.of(truth, x), (lower, upper))
            violation = float(jnp.asarray(checked.violation))
        sign = self.goal.sign
        return Recheck(
            float(sign * self.goal.of(truth, x)),
            float(sign * self.goal.of(predicted, x)),
            violation,
            max(gaps, default=0.0),
        )


def _read(network: Any) -> tuple[Callable, ...]:
    """The networks as callables."""
    given = (network,) if callable(network) or isinstance(network, str | os.PathLike) else network
    return tuple(read_onnx(one) if isinstance(one, str | os.PathLike) else one for one in given)


def _called(network: Callable, x: PyTree) -> PyTree:
    """The output; code that JAX cannot trace is named."""
    try:
        return network(x)
    except Exception as error:
        traced = isinstance(error, jax.errors.TracerArrayConversionError)
        if traced or (isinstance(error, TypeError | RuntimeError) and "Tracer" in str(error)):
            raise TypeError(
                "JAX cannot trace the network, which is NumPy, torch or other code that wants "
                "numbers. Wrap it: `network=lambda x: jax.pure_callback(code, "
                'jax.ShapeDtypeStruct(shape, dtype), x, vmap_method="sequential")`, with the shape '
                "and type of its output."
            ) from error
        raise


def _pulled_back(prediction: Prediction, x: PyTree) -> tuple[PyTree, Callable]:
    """The output and its derivative; a network without one is named."""
    try:
        return jax.vjp(prediction, x)
    except ValueError as error:
        if "callback" not in str(error):
            raise
        raise TypeError(
            "this solver needs gradients and the network gives none, being called from JAX by a "
            "callback: use a solver that needs none, such as `CDSM()`, or "
            "`DirectionalAttack(samples=...)`, which estimates them from values."
        ) from error


def _both(
    bounds: tuple[PyTree, PyTree] | None, trust: tuple[PyTree, PyTree] | None
) -> tuple[PyTree, PyTree] | None:
    """The intersection of two boxes."""
    if bounds is None or trust is None:
        return trust if bounds is None else bounds
    lower = _meet(jnp.maximum, bounds[0], trust[0])
    upper = _meet(jnp.minimum, bounds[1], trust[1])
    if jax.tree.structure(lower) == jax.tree.structure(upper):
        check_order(lower, upper, "what bounds and trust have in common")
    return lower, upper


def _meet(op: Callable, one: PyTree, other: PyTree) -> PyTree:
    """`op` leaf by leaf, where either may be a number for all leaves."""
    if jax.tree_util.all_leaves([one]):
        return jax.tree.map(lambda leaf: op(leaf, one), other)
    if jax.tree_util.all_leaves([other]):
        return jax.tree.map(lambda leaf: op(leaf, other), one)
    return jax.tree.map(op, one, other)
