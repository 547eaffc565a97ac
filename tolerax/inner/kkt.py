"""Linear systems of optimality conditions: a Hessian, rows of constraints, multipliers."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.contracts import Work
from tolerax.inner.minres import MINRES

Vector = Float[Array, "..."]

#: Matrices of more bytes than this are not made.
LARGEST = 16 * 2**30


def check_size(rows: int, columns: int, dtype: Any, remedy: str) -> None:
    """Raise before a matrix is made that does not fit into memory."""
    size = rows * columns * jnp.dtype(dtype).itemsize
    if size > LARGEST:
        raise ValueError(
            f"a matrix of {rows} x {columns} numbers would take {size / 2**30:.0f} GiB, and the "
            f"limit is {LARGEST / 2**30:.0f}: {remedy}."
        )


PRODUCTS = "use `linear=tolerax.inner.KrylovKKT()`, which needs products only"


class KKTSystem(eqx.Module):
    """The operators of

        [ H  A' ] [ d ]     [ a ]
        [ A  -m ] [ e ]  =  [ b ]

    on flat vectors: d has the n entries of x, e one entry a row. Rows that are not `active` say
    `-m e = b` instead.

    - `hessian(d)`, `rows(d)`, `transposed(e)`: products with H, A, A'.
    - `preconditioner(a, b)`: an approximate inverse of the absolute value of the matrix, symmetric
      and positive definite; or `None`. `price`: what one use of it costs.
    """

    hessian: Callable[[Vector], Vector]
    rows: Callable[[Vector], Vector]
    transposed: Callable[[Vector], Vector]
    count: tuple[int, int] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    preconditioner: Callable[[Vector, Vector], tuple[Vector, Vector]] | None = None
    price: Work | None = None

    def in_full(self) -> "KKTSystem":
        """The same system with the rows as a matrix."""
        n, m = self.count
        check_size(m, n, self.dtype, PRODUCTS)
        if m < n:
            matrix = jax.vmap(self.transposed)(jnp.eye(m, dtype=self.dtype))
        else:
            matrix = jax.vmap(self.rows)(jnp.eye(n, dtype=self.dtype)).T
        rows, transposed = Matrix(matrix), Matrix(matrix.T)
        return dataclasses.replace(self, rows=rows, transposed=transposed)


class Matrix(eqx.Module):
    """Products with a matrix."""

    matrix: Float[Array, "rows columns"]

    def __call__(self, vector: Vector) -> Vector:
        return self.matrix @ vector


class KKTResult(eqx.Module):
    """The answer of a solve: the step, what it took, and how far it went.

    - `residual`: the norm of what is left over the norm of the right side, in the norm that the
      solver works in.
    - `spent`: Hessian products, iterations, and what applying the preconditioner cost.
    """

    d: Vector
    e: Vector
    residual: Float[Array, ""]
    spent: Work


class KKTSolver(eqx.Module):
    """What solves the systems of an SQP step.

    `prepare` sees the system once a point, and makes it one whose solutions descend: where H is not
    positive definite on the null space of the `working` rows it gets a curvature of at least
    `floor` there, and `shift` is added to all of it. `solve` is called for one set of active rows
    after the other (`image` is the preconditioner's answer to the right side where it is known),
    `multipliers` once, for those that fit the gradient g best.
    """

    @abc.abstractmethod
    def prepare(
        self, system: KKTSystem, working: Bool[Array, " m"], floor: ArrayLike, shift: ArrayLike
    ) -> Any:
        """The system with H made fit for steps that descend."""

    @abc.abstractmethod
    def hessian(self, prepared: Any, d: Vector) -> Vector:
        """That H times d."""

    @abc.abstractmethod
    def multipliers(self, system: KKTSystem, g: Vector, rows: Bool[Array, " m"]) -> Vector:
        """The multipliers of these rows that fit the gradient g best (least squares)."""

    @abc.abstractmethod
    def solve(
        self,
        prepared: Any,
        active: Bool[Array, " m"],
        regularization: Vector,
        a: Vector,
        b: Vector,
        *,
        relative: ArrayLike,
        image: tuple[Vector, Vector] | None = None,
    ) -> KKTResult:
        """The step for one set of active rows."""


class DenseKKT(KKTSolver):
    """Matrices in full and one factorization a solve: n Hessian products a point.

    Where the Hessian is not positive definite on the null space of the working rows, its
    eigenvalues there are replaced by their absolute values, but at least by the floor.

    >>> import jax.numpy as jnp
    >>> H, A = jnp.diag(jnp.array([1.0, -2.0])), jnp.array([[1.0, 0.0]])
    >>> system = KKTSystem(lambda d: H @ d, lambda d: A @ d, lambda e: A.T @ e, (2, 1), float)
    >>> solver, one = DenseKKT(), jnp.array([True])
    >>> prepared = solver.prepare(system, one, 0.1, 0.0)
    >>> solver.hessian(prepared, jnp.array([0.0, 1.0]))
    Array([0., 2.], dtype=float64)
    """

    def prepare(
        self, system: KKTSystem, working: Bool[Array, " m"], floor: ArrayLike, shift: ArrayLike
    ) -> tuple[Array, Array]:
        check_size(sum(system.count), sum(system.count), system.dtype, PRODUCTS)
        eye = jnp.eye(system.count[0], dtype=system.dtype)
        h = (
            system.hessian.matrix
            if isinstance(system.hessian, Matrix)
            else jax.vmap(system.hessian)(eye)
        )
        h = 0.5 * (h + h.T)
        a = _rows_of(system)
        return _convex(h, a * working[:, None], floor, shift), a

    def hessian(self, prepared: tuple[Array, Array], d: Vector) -> Vector:
        return prepared[0] @ d

    def multipliers(self, system: KKTSystem, g: Vector, rows: Bool[Array, " m"]) -> Vector:
        a = _rows_of(system) * rows[:, None]
        square = a @ a.T
        size = jnp.finfo(g.dtype).eps * (1 + jnp.linalg.norm(square))
        e = jnp.linalg.solve(square + size * jnp.eye(a.shape[0], dtype=g.dtype), -a @ g)
        # Where constraints nearly depend on each other the fit says little.
        return jnp.where(jnp.all(jnp.abs(e) <= 1e3), jnp.where(rows, e, 0), 0)

    def solve(
        self,
        prepared: tuple[Array, Array],
        active: Bool[Array, " m"],
        regularization: Vector,
        a: Vector,
        b: Vector,
        *,
        relative: ArrayLike,
        image: tuple[Vector, Vector] | None = None,
    ) -> KKTResult:
        del relative, image
        matrix = _whole(prepared, active, regularization)
        n, eps = a.size, jnp.finfo(a.dtype).eps
        right = jnp.concatenate([a, b])
        factors = jax.scipy.linalg.lu_factor(matrix)
        z = jax.scipy.linalg.lu_solve(factors, right)
        left = right - matrix @ z
        # One step of refinement: rows that depend on each other leave a matrix near singular.
        z = z + jax.scipy.linalg.lu_solve(factors, left)
        residual = jnp.linalg.norm(right - matrix @ z) / jnp.maximum(jnp.linalg.norm(right), eps)
        return KKTResult(z[:n], z[n:], residual, Work(hessian_products=n, linear_iterations=1))


def _whole(
    prepared: tuple[Array, Array], active: Bool[Array, " m"], regularization: Vector
) -> Float[Array, "k k"]:
    """The matrix of the system in full."""
    h, rows = prepared
    rows = rows * active[:, None]
    return jnp.block([[h, rows.T], [rows, -jnp.diag(regularization)]])


def _rows_of(system: KKTSystem) -> Float[Array, "m n"]:
    rows = system.rows if isinstance(system.rows, Matrix) else system.in_full().rows
    return rows.matrix  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]


def _convex(h: Array, working: Array, floor: ArrayLike, shift: ArrayLike) -> Array:
    """H with positive curvature on the null space of the working rows."""
    n = h.shape[0]
    _, s, vt = jnp.linalg.svd(working, full_matrices=True)
    size = jnp.max(s, initial=0)
    rank = jnp.sum(s > 1e-10 * max(working.shape) * size)
    inside = (
        vt.T * (jnp.arange(n) >= rank)[None]
    )  # columns span the null space, the others are zero
    # On the complement any other number keeps eigenvectors apart.
    apart = 1 + 2 * jnp.linalg.norm(h)
    complement = vt.T * (jnp.arange(n) < rank)[None]
    e, q = jnp.linalg.eigh(
        inside @ (inside.T @ h @ inside) @ inside.T + apart * complement @ complement.T
    )
    ours = e < 0.75 * apart
    largest = jnp.max(jnp.where(ours, jnp.abs(e), 0), initial=0)
    wanted = jnp.where(e > 1e-8 * largest, e, jnp.maximum(jnp.abs(e), floor))
    return h + shift * jnp.eye(n, dtype=h.dtype) + (q * jnp.where(ours, wanted - e, 0)[None]) @ q.T


class KrylovKKT(KKTSolver):
    """Preconditioned minimal residuals: products only, as accurate as is asked.

    The preconditioner is that of the system. Without a good one only small or well-scaled systems
    are solved in reasonable time.

    - `linear`: a [`MINRES`][].
    """

    linear: MINRES = eqx.field(default_factory=MINRES)

    def prepare(
        self, system: KKTSystem, working: Bool[Array, " m"], floor: ArrayLike, shift: ArrayLike
    ) -> tuple[KKTSystem, Array]:
        del working, floor
        return system, jnp.asarray(shift, system.dtype)

    def hessian(self, prepared: tuple[KKTSystem, Array], d: Vector) -> Vector:
        system, shift = prepared
        return system.hessian(d) + shift * d

    def multipliers(self, system: KKTSystem, g: Vector, rows: Bool[Array, " m"]) -> Vector:
        # The least-squares fit: the same system with the identity as Hessian.
        plain = eqx.tree_at(lambda s: s.hessian, system, lambda d: d)
        none = jnp.zeros(rows.shape, g.dtype)
        prepared = self.prepare(plain, rows, 0.0, 0.0)
        fit = self.solve(prepared, rows, none, -g, none, relative=1e-2).e
        return jnp.where(jnp.all(jnp.abs(fit) <= 1e3), jnp.where(rows, fit, 0), 0)

    def solve(
        self,
        prepared: tuple[KKTSystem, Array],
        active: Bool[Array, " m"],
        regularization: Vector,
        a: Vector,
        b: Vector,
        *,
        relative: ArrayLike,
        image: tuple[Vector, Vector] | None = None,
    ) -> KKTResult:
        system, _ = prepared
        n, _ = system.count

        def product(z: Vector) -> Vector:
            d, e = z[:n], z[n:]
            top = self.hessian(prepared, d) + system.transposed(jnp.where(active, e, 0))
            bottom = jnp.where(active, system.rows(d), 0) - regularization * e
            return jnp.concatenate([top, bottom])

        inverse, blocks = None, system.preconditioner
        if blocks is not None:
            inverse = lambda z: jnp.concatenate(blocks(z[:n], z[n:]))  # noqa: E731
        right = jnp.concatenate([a, b])
        solve = self.linear(
            product,
            right,
            tolerance=0.0,
            relative=relative,
            preconditioner=inverse,
            image=None if image is None else jnp.concatenate(image),
            exact_residual=False,
        )
        tiny = jnp.finfo(a.dtype).tiny
        residual = solve.error / jnp.maximum(solve.first_error, tiny)
        spent = Work(hessian_products=solve.products, linear_iterations=solve.iterations)
        if system.price is not None:
            times = solve.iterations + (image is None)
            spent = spent + jax.tree.map(lambda count: times * count, system.price)
        return KKTResult(solve.x[:n], solve.x[n:], residual, spent)


class SketchAndProject(KKTSolver):
    """Randomized projections onto one sketched equation after the other: the solver of the paper,
    for comparisons.

    With the matrix G of the system and the residual r, a step is
    `z <- z - G's (s'r) / |G's|^2`: with a Gaussian s a product each, with a row of G a randomized
    Kaczmarz step. It contracts by about `1 - (sigma_min / |G|_F)^2`: hundreds of steps where the
    matrix is small and well conditioned, hopeless for the matrices of PDEs. Forms all matrices.

    - `kind`: `"gaussian"` or `"kaczmarz"`. `max_steps`: the most projections of a solve. `seed`.

    Source: Gower and Richtarik (*SIAM J. Matrix Anal. Appl.* 36, 2015), as used by Hong, Na,
    Mahoney, Kolar (ICML 2023, arXiv 2305.18379).

    >>> import tolerax
    >>> from tolerax.inner import SketchAndProject
    >>> circle = tolerax.Objective(
    ...     lambda x: x[0] + x[1], constraints=lambda x: x @ x, constraint_bounds=(2.0, 2.0)
    ... )
    >>> solver = tolerax.ExactAugmentedLagrangian(linear=SketchAndProject(), atol=1e-4)
    >>> tolerax.solve(circle, solver, jnp.array([-2.0, 0.0])).x.round(3)
    Array([-1., -1.], dtype=float64)
    """

    kind: Literal["gaussian", "kaczmarz"] = eqx.field(static=True, default="gaussian")
    max_steps: int = 100_000
    seed: int = 0

    def __check_init__(self):
        if self.kind not in ("gaussian", "kaczmarz"):
            raise ValueError(f'kind is {self.kind!r}: use "gaussian" or "kaczmarz".')

    def prepare(
        self, system: KKTSystem, working: Bool[Array, " m"], floor: ArrayLike, shift: ArrayLike
    ) -> tuple[Array, Array]:
        return DenseKKT().prepare(system, working, floor, shift)

    def hessian(self, prepared: tuple[Array, Array], d: Vector) -> Vector:
        return prepared[0] @ d

    def multipliers(self, system: KKTSystem, g: Vector, rows: Bool[Array, " m"]) -> Vector:
        return DenseKKT().multipliers(system, g, rows)

    def solve(
        self,
        prepared: tuple[Array, Array],
        active: Bool[Array, " m"],
        regularization: Vector,
        a: Vector,
        b: Vector,
        *,
        relative: ArrayLike,
        image: tuple[Vector, Vector] | None = None,
    ) -> KKTResult:
        del image
        matrix, right = _whole(prepared, active, regularization), jnp.concatenate([a, b])
        n, size = a.size, jnp.linalg.norm(right)
        squares = jnp.sum(matrix**2, axis=1)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, r, step, _ = state
            return (jnp.linalg.norm(r) > relative * size) & (step < self.max_steps)

        def project(state: tuple) -> tuple:
            z, r, step, key = state
            key, now = jax.random.split(key)
            if self.kind == "gaussian":
                s = jax.random.normal(now, right.shape, right.dtype)
                row, left = matrix.T @ s, jnp.dot(s, r)
                square = jnp.dot(row, row)
            else:
                i = jax.random.randint(now, (), 0, right.size)
                row, left, square = matrix[i], r[i], squares[i]
            length = jnp.where(square > 0, left / jnp.where(square > 0, square, 1), 0)
            return z - length * row, r - length * (matrix @ row), step + 1, key

        zero = jnp.array(0, jnp.result_type(int))
        begin = (jnp.zeros_like(right), -right, zero, jax.random.key(self.seed))
        z, r, steps, _ = jax.lax.while_loop(unfinished, project, begin)
        tiny = jnp.finfo(right.dtype).tiny
        residual = jnp.linalg.norm(r) / jnp.maximum(size, tiny)
        spent = Work(hessian_products=n, linear_iterations=steps)
        return KKTResult(z[:n], z[n:], residual, spent)
