"""Steps whose size is controlled, through diffrax, and what their tolerance leaves of gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from tolerax.contracts import Accuracy, Evaluation, Work, tree_all_finite
from tolerax.status import PointStatus

Scalar = Float[Array, ""]

COARSER = 10.0  # the second run, which says how far the first is from the truth


class AdaptiveSteps(eqx.Module):
    """Steps of a [diffrax](https://docs.kidger.site/diffrax/) solver, for [`TimeDependent`][].

    The solution of the differential equation is the truth, and the tolerance of the step size
    controller is the accuracy. The gradient is that of the steps that were made, by diffrax's
    checkpointed adjoint: no adjoint equation is discretized, so nothing can be inconsistent, and
    memory grows slower than the number of steps.

    A second run with a tolerance ten times as large says how far the first is from the truth:
    differences of state and gradient are taken as the errors of the finer run, which are about ten
    times smaller where errors follow the tolerance. Where steps are long, the finer run takes at
    least two where the other may take one. From the difference it is also learned which tolerance
    the next request takes. All of this is an estimate and is called that.

    - `solver`: a diffrax solver; `Tsit5()` by default, for stiff equations `Kvaerno5()`.
    - `max_steps`: the most steps; a point that needs more has failed.

    Where controls are given, steps end at the ends of their intervals. There are no Hessian
    products: use [`InexactLineSearch`][]. A stage of a step counts as one of `lower_gradients`,
    once forward and once back.

    >>> import jax.numpy as jnp, tolerax
    >>> decay = tolerax.TimeDependent(
    ...     lambda t, y, rate: -rate * y,
    ...     lambda y, rate: (y - 0.5) ** 2,
    ...     jnp.array(1.0),
    ...     method=tolerax.AdaptiveSteps(),
    ... )
    >>> print(decay.provenance)
    errors: estimated
    """

    solver: Any = None
    max_steps: int = eqx.field(static=True, default=4096)

    def cold_start(self) -> Scalar:
        """Errors over tolerances, as far as they are known."""
        return jnp.ones(())

    def evaluate(
        self, problem: Any, x: PyTree, accuracy: Accuracy, carry: Scalar, derivatives: int
    ) -> Evaluation:
        """One point."""
        del derivatives
        dtype = ravel_pytree(problem.start(x))[0].dtype
        finest = 32 * jnp.finfo(dtype).eps
        tolerance = jnp.clip(accuracy.state / carry, finest, 0.1).astype(dtype)

        def run(settings: tuple[Scalar, Scalar]) -> tuple:
            total = lambda x: self._total(problem, x, *settings)  # noqa: E731
            (value, rest), gradient = jax.value_and_grad(total, has_aux=True)(x)
            return value, gradient, rest

        zero = jnp.zeros((), dtype)
        beyond = problem.times[1].astype(dtype) - problem.times[0]
        weight = jnp.sqrt(problem.weight).astype(dtype)

        def attempt(state: tuple) -> tuple:
            _, tolerance, distance, spent, tries = state
            # Where the ends of intervals limit the steps it takes more than was asked.
            tighter = jnp.clip(0.1 * tolerance * accuracy.state / distance, finest, tolerance)
            tolerance = jnp.where(tries > 0, tighter, tolerance)
            settings = (jnp.stack([tolerance, COARSER * tolerance]), jnp.stack([zero, beyond]))
            both = jax.lax.map(run, settings)
            y, steps = both[2][0], both[2][2]
            apart = weight * jnp.linalg.norm(ravel_pytree(jax.tree.map(jnp.diff, _pairs(y)))[0])
            return both, tolerance, apart, spent + jnp.sum(steps), tries + 1

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, tolerance, distance, _, tries = state
            return (tries == 0) | ((distance > accuracy.state) & (tolerance > finest) & (tries < 5))

        count = jnp.array(0, jnp.result_type(int))
        begin = (None, tolerance, zero, count, count)
        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(attempt, begin)[0]
        )
        both, tolerance, distance, spent, _ = jax.lax.while_loop(
            unfinished, attempt, (nothing, *begin[1:])
        )
        fine, coarse = (jax.tree.map(lambda leaf: leaf[i], both) for i in (0, 1))  # noqa: B023
        value, gradient, (y, cost, steps, good) = fine
        slope = jax.grad(lambda y: problem.final_cost(y, x))(y)
        parts = [
            jnp.abs(a * (b - c))
            for a, b, c in zip(*map(jax.tree.leaves, (slope, y, coarse[2][0])), strict=True)
        ]
        off = jax.tree.map(jnp.subtract, gradient, coarse[1])
        rounding = 16 * jnp.finfo(dtype).eps * jnp.sqrt(1.0 + steps)
        value_error = sum(map(jnp.sum, parts)) + jnp.abs(cost - coarse[2][1])
        value_error = value_error + rounding * jnp.abs(value)
        from_state = problem.dual_norm(off) + rounding * problem.dual_norm(gradient)
        distance = distance + rounding * weight * jnp.linalg.norm(ravel_pytree(y)[0])
        finite = jnp.isfinite(value + value_error + from_state) & tree_all_finite(gradient)
        floor = (tolerance <= finest) & (distance > accuracy.state)
        status = PointStatus.where(floor, PointStatus.floor, PointStatus.ok)
        ok = finite & good & coarse[2][3]
        status = PointStatus.where(ok, status, PointStatus.failed)
        # What is learned loosens the tolerance by a factor of ten at most.
        ratio = jnp.clip(distance / tolerance, 0.1, 100 * carry)
        stages = 2 * getattr(getattr(self._solver, "tableau", None), "num_stages", 1)
        work = Work(points=1, values=1, gradients=1, lower_gradients=stages * spent)
        return Evaluation(
            value=value,
            value_error=value_error,
            gradient=gradient,
            gradient_error=from_state,
            gradient_error_parts=Accuracy(from_state, zero),
            achieved=Accuracy(distance, zero),
            work=work,
            status=status,
            carry=jnp.where(ok, ratio, carry),
            provenance=problem.provenance,
        )

    @property
    def _solver(self) -> Any:
        import diffrax

        return diffrax.Tsit5() if self.solver is None else self.solver

    def _total(
        self, problem: Any, x: PyTree, tolerance: Scalar, late: Scalar
    ) -> tuple[Scalar, tuple]:
        """The cost of a run; the last state, the integral, the steps, and whether it got there.

        Steps end in the middle of every interval of the controls too, `late` by so much.
        """
        import diffrax

        t0, t1 = problem.times
        control, jumps, middles = self._control(problem, x)

        def field(t: Any, state: tuple, x: PyTree) -> tuple:
            y, u = state[0], control(t, x)
            cost = problem.running_cost
            return problem.vector_field(t, y, u), jnp.zeros(()) if cost is None else cost(t, y, u)

        # Absolute, as what is asked for is.
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=0.0, atol=tolerance),
            step_ts=middles + late,
            jump_ts=jumps if jumps.size else None,
        )
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            self._solver,
            t0,
            t1,
            None,
            (problem.start(x), jnp.zeros(())),
            x,
            stepsize_controller=controller,
            max_steps=self.max_steps,
            throw=False,
        )
        y, cost = jax.tree.map(lambda leaf: leaf[0], solution.ys)
        good = solution.result == diffrax.RESULTS.successful
        steps = solution.stats["num_steps"]
        return problem.final_cost(y, x) + cost, (y, cost, steps, good)

    def _control(self, problem: Any, x: PyTree) -> tuple[Any, Array, Array]:
        """u at a time as a function of x, the times at which it jumps, those in between."""
        count = 1
        if problem.controls is not None:
            shapes = jax.tree.leaves(jax.eval_shape(problem.controls, x))
            lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in shapes}
            if len(lengths) != 1 or 0 in lengths:
                raise ValueError(
                    f"controls have leading axes of lengths {sorted(lengths)}: give all leaves the "
                    "same."
                )
            count = lengths.pop()
        t0, t1 = problem.times
        jumps = t0 + (t1 - t0) * jnp.arange(1, count) / count
        middles = t0 + (t1 - t0) * (jnp.arange(count) + 0.5) / count

        def control(t: Scalar, x: PyTree) -> PyTree:
            if problem.controls is None:
                return x
            n = jnp.searchsorted(jumps, t, side="right")
            return jax.tree.map(lambda leaf: leaf[n], problem.controls(x))

        return control, jumps, middles


def _pairs(tree: PyTree) -> PyTree:
    """Both runs along the last axis."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), tree)
