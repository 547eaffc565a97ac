"""Sweeps over the steps of implicit Euler: states and their tangents forward, adjoints back.

With z the state after a step from y, and q the adjoint of its equation,

    z = y + dt f(t, z, u)                     K z' = y' + dt f_u u' ,  K = I - dt f_z
    K^T q = p + dt l_z                        p: the adjoint of the step after, l: running cost

The same linear sweeps, forward for z' and backward for q', serve two ends. Driven by a direction of
the control they give a product with the Hessian. Driven by the residuals that inexact solves have
left they give the errors of state, adjoint, value and gradient to first order.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Work
from tolerax.inner.direct import Direct
from tolerax.inner.roots import NewtonKrylov
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]

ERROR_SOLVES = 0.1  # relative accuracy over the whole interval of the sweeps that estimate errors


class Ahead(eqx.Module):
    """What a sweep forward carries: state, its tangent or error, the running cost, counts."""

    y: Vector
    dy: Vector
    cost: Scalar
    largest: Scalar
    failed: Bool[Array, ""]
    short: Bool[Array, ""]
    products: Int[Array, ""]
    others: Int[Array, ""]


class Back(eqx.Module):
    """What a sweep backward carries: the adjoint p, its tangents or errors, those of the gradient
    (`None` where every step has its own control), the last of the tangents of p, counts."""

    p: Vector
    dp: Float[Array, "k n"]
    gradient: PyTree
    dgradient: PyTree
    correction: Scalar
    value_error: Scalar
    largest: Scalar
    short: Bool[Array, ""]
    products: Int[Array, ""]
    others: Int[Array, ""]
    last: Vector


class March:
    """The sweeps of a problem at a fixed x, on flat states.

    - `v`: a direction like x: tangents are taken along it, with linear solves to `relative`.
      `None`: they are the errors.
    - `known`: states and adjoints after every step, where they have been stored.
    - `second`: 1, or 0 to leave out the second derivatives of the vector field.
    """

    def __init__(
        self,
        problem: Any,
        x: PyTree,
        accuracy: Accuracy,
        v: PyTree | None = None,
        relative: ArrayLike = ERROR_SOLVES,
        known: Any = None,
        second: ArrayLike = 1.0,
    ):
        method = problem.method
        self.problem, self.x, self.v, self.known = problem, x, v, known
        self.second = second
        self.y0, self.unravel = ravel_pytree(problem.start(x))
        self.steps, dtype = method.steps, self.y0.dtype
        t0, t1 = (t.astype(dtype) for t in problem.times)
        self.t0, self.dt = t0, (t1 - t0) / self.steps
        self.weight = problem.weight.astype(dtype)
        self.linear = method.linear
        # Krylov methods use the preconditioner once more than they multiply.
        self.extra = 0 if isinstance(self.linear, Direct) else 1
        self.inverse: Any = None
        if method.preconditioner is not None:
            apply = method.preconditioner(self.dt)
            self.inverse = lambda r: ravel_pytree(apply(self.unravel(r)))[0]
        share = self.steps * jnp.sqrt(self.weight)
        self.tolerance = (accuracy.state / share).astype(dtype)
        self.adjoint_tolerance = (accuracy.adjoint / share).astype(dtype)
        self.relative = jnp.asarray(relative, dtype) / self.steps
        self.stored = known is not None or self.steps * self.y0.size <= method.store_up_to
        # Every segment begins at a state that is kept.
        self.length = self.steps if self.stored else round(self.steps**0.5)
        self.segments = -(-self.steps // self.length)
        self.series = self.directions = None
        if problem.controls is not None:
            self.series = problem.controls(x)
            if v is not None:
                self.directions = jax.jvp(problem.controls, (x,), (v,))[1]
            self.repeats = _repeats(self.series, self.steps)

    # -- one step ---------------------------------------------------------------------------------

    def control(self, series: PyTree, whole: PyTree, n: Int[Array, ""]) -> PyTree:
        """u in step n, of a series or the same always."""
        if self.series is None:
            return whole
        return jax.tree.map(lambda leaf: leaf[n // self.repeats], series)

    def field(self, z: Vector, u: PyTree, t: Scalar) -> Vector:
        """f(t, z, u)."""
        return ravel_pytree(self.problem.vector_field(t, self.unravel(z), u))[0]

    def running(self, z: Vector, u: PyTree, t: Scalar) -> Scalar:
        """What a step adds to the cost."""
        cost = self.problem.running_cost
        return jnp.zeros_like(t) if cost is None else self.dt * cost(t, self.unravel(z), u)

    def lagrangian(self, z: Vector, u: PyTree, q: Vector, t: Scalar) -> Scalar:
        """The part of the Lagrangian that bends: running cost plus `dt <q, f>`."""
        return self.running(z, u, t) + self.pairing(z, u, q, t)

    def pairing(self, z: Vector, u: PyTree, q: Vector, t: Scalar) -> Scalar:
        """`dt <q, f(t, z, u)>` in the inner product of states."""
        return self.weight * self.dt * jnp.dot(q, self.field(z, u, t))

    def advance(self, state: Ahead, n: Int[Array, ""]) -> tuple[Ahead, tuple]:
        """One step: the state, and its tangent or error."""
        t = self.t0 + (n + 1) * self.dt
        u = self.control(self.series, self.x, n)
        residual = lambda z: z - state.y - self.dt * self.field(z, u, t)  # noqa: E731
        evaluations = products = jnp.zeros_like(state.products)
        failed = short = jnp.array(False)
        if self.known is None:
            newton = NewtonKrylov(self.linear)
            root = newton(
                residual,
                state.y,
                self.tolerance,
                stability=1.0,
                preconditioner=self.inverse,
                everywhere=True,
            )
            z, r = root.y, root.residual
            evaluations, products = root.evaluations, root.products
            failed = root.status == PointStatus.failed
            short = root.status != PointStatus.ok
        else:
            z, r = self.known[0][n], jnp.zeros_like(state.y)
        operator = jax.linearize(residual, z)[1]
        source = -r
        if self.v is not None:
            du = self.control(self.directions, self.v, n)
            source = self.dt * jax.jvp(lambda u: self.field(z, u, t), (u,), (du,))[1]
        tangent = self.solve(operator, state.dy + source, relative=self.relative)
        after = Ahead(
            z,
            tangent.x,
            state.cost + self.running(z, u, t),
            jnp.maximum(state.largest, _length(tangent.x, tangent.converged)),
            state.failed | failed,
            state.short | short,
            state.products + products + tangent.products,
            state.others + evaluations + self.extra,
        )
        return after, (z, tangent.x, r)

    def retreat(self, state: Back, n: Int[Array, ""], step: tuple) -> tuple[Back, tuple]:
        """One step back: the adjoint, its tangents or errors, and the gradient in u."""
        z, dz, r = step
        t = self.t0 + (n + 1) * self.dt
        u = self.control(self.series, self.x, n)
        residual = lambda z: z - self.dt * self.field(z, u, t)  # noqa: E731
        pullback = jax.vjp(residual, z)[1]
        transpose = lambda w: pullback(w)[0]  # noqa: E731
        b = state.p + jax.grad(self.running)(z, u, t) / self.weight
        if self.known is None:
            solve = self.solve(transpose, b, tolerance=self.adjoint_tolerance, guess=state.p)
            q, s, products, short = solve.x, solve.residual, solve.products, ~solve.converged
        else:
            q, s = self.known[1][n], jnp.zeros_like(b)
            products, short = jnp.zeros_like(state.products), jnp.array(False)
        gradient = jax.grad(self.lagrangian, argnums=1)(z, u, q, t)
        # What bends: the change of the equations of q and of the gradient with z and u.
        du = jax.tree.map(jnp.zeros_like, u)
        if self.v is not None:
            du = self.control(self.directions, self.v, n)
        slopes = lambda z, u: jax.grad(self.lagrangian, argnums=(0, 1))(z, u, self.second * q, t)  # noqa: E731
        of_z, of_u = jax.jvp(slopes, (z, u), (dz, du))[1]
        sources = of_z[None] / self.weight
        if self.v is None:
            sources = jnp.concatenate([sources, s[None]])
        each = lambda b: self.solve(transpose, b, relative=self.relative)  # noqa: E731
        tangents = jax.lax.map(each, state.dp + sources)
        by_q = jax.vmap(lambda dq: jax.grad(self.pairing, argnums=1)(z, u, dq, t))(tangents.x)
        dgradient = jax.tree.map(lambda change, direct: change.at[0].add(direct), by_q, of_u)
        emitted = (gradient, dgradient)
        if self.series is None:
            total, dtotal = (state.gradient, state.dgradient)
            gradient, dgradient = jax.tree.map(jnp.add, (total, dtotal), emitted)
        else:
            gradient = dgradient = None
        bent = jnp.abs(self.weight * jnp.dot(s, dz)) + 0.5 * jnp.abs(jnp.dot(of_z, dz))
        after = Back(
            q,
            tangents.x,
            gradient,
            dgradient,
            state.correction + self.weight * jnp.dot(q, r),
            state.value_error + bent,
            jnp.maximum(state.largest, _length(tangents.x[-1], tangents.converged[-1])),
            state.short | short,
            state.products + products + jnp.sum(tangents.products),
            state.others + self.extra * (tangents.products.size + (self.known is None)),
            state.last,
        )
        return after, (emitted if self.series is not None else (), q)

    def solve(self, operator: Any, b: Vector, **options: Any) -> Any:
        """A linear solve of a step."""
        options = {"tolerance": 0.0, **options}
        return self.linear(operator, b, preconditioner=self.inverse, **options)

    # -- sweeps -----------------------------------------------------------------------------------

    def skipping(self, function: Callable) -> Callable:
        """A step of a scan that does nothing beyond the last step of the march."""

        def body(state: Any, item: tuple) -> tuple:
            n = item[0]
            step = lambda: function(state, *item)  # noqa: E731
            if self.segments * self.length == self.steps:
                return step()
            shapes = jax.eval_shape(step)[1]
            blank = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
            return jax.lax.cond(n < self.steps, step, lambda: (state, blank()))

        return body

    def numbers(self) -> Int[Array, "segments length"]:
        """The numbers of all steps."""
        return jnp.arange(self.segments * self.length).reshape(self.segments, self.length)

    def forward(self) -> tuple[Ahead, Any]:
        """All steps, and what the way back needs: every step, or where segments began."""
        y, zero, count = self.y0, jnp.zeros_like(self.t0), jnp.array(0, jnp.result_type(int))
        dy = jnp.zeros_like(y)
        if self.v is not None and callable(self.problem.y0):
            begin = lambda x: ravel_pytree(self.problem.start(x))[0]  # noqa: E731
            dy = jax.jvp(begin, (self.x,), (self.v,))[1]
        false = jnp.array(False)
        first = Ahead(y, dy, zero, zero, false, false, count, count)
        if self.stored:
            return self._segment(first, self.numbers()[0])

        def segment(state: Ahead, numbers: Array) -> tuple[Ahead, tuple]:
            return self._segment(state, numbers)[0], (state.y, state.dy)

        return jax.lax.scan(segment, first, self.numbers())

    def _segment(self, state: Ahead, numbers: Array) -> tuple[Ahead, tuple]:
        body = self.skipping(lambda state, n: self.advance(state, n))
        return jax.lax.scan(body, state, (numbers,))

    def backward(self, ahead: Ahead, trail: Any) -> Back:
        """From the last state to the first."""
        slope = lambda y, x: jax.grad(self._final)(y, x) / self.weight  # noqa: E731
        along = jax.tree.map(jnp.zeros_like, self.x) if self.v is None else self.v
        p, dp = jax.jvp(slope, (ahead.y, self.x), (ahead.dy, along))
        columns = 2 if self.v is None else 1
        dps = jnp.zeros((columns, *p.shape), p.dtype).at[0].set(dp)
        gradient = dgradient = None
        if self.series is None:
            gradient = jax.tree.map(jnp.zeros_like, self.x)
            dgradient = jax.tree.map(lambda g: jnp.zeros((columns, *g.shape), g.dtype), gradient)
        zero, count = jnp.zeros_like(self.t0), jnp.array(0, jnp.result_type(int))
        false = jnp.array(False)
        start = Back(p, dps, gradient, dgradient, zero, zero, zero, false, count, count, dp)

        def retrace(state: Back, numbers: Array, steps: tuple) -> tuple[Back, tuple]:
            body = self.skipping(self.retreat)
            return jax.lax.scan(body, state, (numbers, steps), reverse=True)

        def segment(state: Back, item: tuple) -> tuple[Back, tuple]:
            numbers, (y, dy) = item
            again = eqx.tree_at(lambda a: (a.y, a.dy), ahead, (y, dy))
            again, steps = self._segment(again, numbers)
            made = lambda s: (s.products, s.others)  # noqa: E731
            new = [a - b for a, b in zip(made(again), made(ahead), strict=True)]
            state = eqx.tree_at(made, state, [a + b for a, b in zip(made(state), new, strict=True)])
            return retrace(state, numbers, steps)

        if self.stored:
            back, (emitted, q) = retrace(start, self.numbers()[0], trail)
        else:
            items = (self.numbers(), trail)
            back, (emitted, q) = jax.lax.scan(segment, start, items, reverse=True)
            emitted = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), emitted)
        self.adjoints = q
        if self.series is None:
            return back
        gradients, dgradients = jax.tree.map(lambda leaf: leaf[: self.steps], emitted)
        back = eqx.tree_at(
            lambda b: (b.gradient, b.dgradient),
            back,
            (self._added(gradients, 0), self._added(dgradients, 1)),
            is_leaf=lambda leaf: leaf is None,
        )
        return back

    def _added(self, tree: PyTree, columns: int) -> PyTree:
        """Sums over the steps of every interval, columns first."""

        def one(leaf: Array) -> Array:
            rest = leaf.shape[1:]
            sums = jnp.sum(leaf.reshape(-1, self.repeats, *rest), axis=1)
            return jnp.moveaxis(sums, 1, 0) if columns else sums

        return jax.tree.map(one, tree)

    def _final(self, y: Vector, x: PyTree) -> Scalar:
        return self.problem.final_cost(self.unravel(y), x)

    # -- the gradient in x ------------------------------------------------------------------------

    def assemble(self, x: PyTree, y: Vector, gradient: PyTree, p: Vector) -> PyTree:
        """The gradient in x from that in the controls and from the first adjoint."""

        def total(x: PyTree) -> Scalar:
            u = x if self.series is None else self.problem.controls(x)
            of_u = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradient, u))
            of_y = jnp.dot(p, ravel_pytree(self.problem.start(x))[0])
            return self._final(y, x) + of_u + self.weight * of_y

        return jax.grad(total)(x)

    def assemble_errors(self, ahead: Ahead, back: Back) -> list[PyTree]:
        """Tangents of the gradient in x: along a direction, or one from the errors of states and
        one from those of adjoints."""
        gradient, p = jax.tree.map(lambda leaf: self.second * leaf, (back.gradient, back.p))
        along = jax.tree.map(jnp.zeros_like, self.x) if self.v is None else self.v
        found = []
        for k in range(back.dp.shape[0]):
            dy = ahead.dy if k == 0 else jnp.zeros_like(ahead.dy)
            change = jax.tree.map(lambda leaf: leaf[k], back.dgradient)  # noqa: B023
            point = (self.x, ahead.y, gradient, p)
            found.append(jax.jvp(self.assemble, point, (along, dy, change, back.dp[k]))[1])
        return found

    def states(self, trail: Any) -> tuple:
        """States and adjoints after every step, once both sweeps are done."""
        return trail[0], self.adjoints

    def work(self, ahead: Ahead, back: Back) -> Work:
        """What both sweeps took."""
        products, others = ahead.products + back.products, ahead.others + back.others
        if self.inverse is None:
            return Work(
                lower_gradients=others, hessian_products=products, linear_iterations=products
            )
        return Work(pde_solves=products + others, linear_iterations=products)


def _length(error: Vector, known: Bool[Array, ""]) -> Scalar:
    """The size of an error, infinite where it could not be solved for."""
    return jnp.where(known, jnp.linalg.norm(error), jnp.inf)


def _repeats(series: PyTree, steps: int) -> int:
    """Steps in an interval of the controls."""
    leaves = jax.tree.leaves(series)
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths or steps % min(lengths):
        raise ValueError(
            f"controls have leading axes of lengths {sorted(lengths)}: give all leaves the same, "
            f"a divisor of the {steps} steps."
        )
    return steps // lengths.pop()
