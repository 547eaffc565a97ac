"""A layer that makes any network obey an equation: least squares in the span of its outputs."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from tolerax.inner.experts import Tied
from tolerax.inner.lane_adjoint import Hessian
from tolerax.inner.levenberg_marquardt import (
    BatchedLevenbergMarquardt,
    LaneSolver,
    LeastSquaresResult,
)
from tolerax.inner.residuals import Pointwise, Structured
from tolerax.problems.implicit import BackwardReport
from tolerax.problems.lanes import batched_least_squares
from tolerax.problems.routers import Router
from tolerax.validation import is_concrete

Grid = Float[Array, "*grid"]


class Equation(eqx.Module):
    """An equation for a field u on a regular grid, point by point.

    - `channels(u)`: from a field of shape `grid` to what the equation needs of it at every point
      (u, u_t, u_x, ...), shape `(C, *grid)`. Linear. Fields are differentiated whole, before they
      are divided among experts, so nothing is one-sided at a face.
    - `residual(z, data)`: from channels of shape `(C, m)` at m points to residuals, shape `(m,)`,
      that the solution makes 0. Rows for initial and boundary values are the residuals of the
      points there. Scale them: all rows count alike.
    - `data(inputs)`: pytree of what residuals need beside channels. Leaves of shape `grid` are
      looked up at the points; others are passed as they are.
    - `lift(inputs)`: a field that the solution is looked for around, `u = lift + sum_j w_j b_j`;
      with basis functions that vanish there, initial and boundary values hold exactly.
    - `everywhere`: mask of shape `grid`: the points whose rows every expert gets (a boundary that
      pins down experts which do not touch it).
    - `balance(z, inputs)`: from the channels of the whole field, shape `(C, *grid)`, to a vector
      that is held at 0 exactly, whatever the residuals: conservation. Scale it to about 1.
    """

    channels: Callable[[Any], Any]
    residual: Callable[[Any, Any], Any]
    data: Callable[[Any], Any] | None = None
    lift: Callable[[Any], Any] | None = None
    everywhere: np.ndarray | None = None
    balance: Callable[[Any, Any], Any] | None = None


class WarmStart(eqx.Module):
    """Where to start next time on the same samples: coefficients and trust regions of the lanes,
    with an axis of samples in front."""

    w: Float[Array, "samples lanes n"]
    radius: Float[Array, "samples lanes"]

    @classmethod
    def blank(cls, samples: int, lanes: int, n: int) -> "WarmStart":
        """Zeros, without a trust region."""
        return cls(jnp.zeros((samples, lanes, n)), jnp.full((samples, lanes), jnp.inf, float))


class Field(eqx.Module):
    """What a [`HardConstrained`][] layer returns, for each sample.

    - `u`: the field. `z`: its channels. `residual`: the equation's, at every point of the grid.
    - `coefficients`: of each expert. `jump`: root mean square of the differences of neighbouring
      experts on both sides of their faces, relative to that of u; 0 without faces.
    - `warm`: to pass as `warm` next time. `lanes`: cost, error, condition, status and evaluations
      in every lane of the solve.
    """

    u: Float[Array, "samples *grid"]
    z: Float[Array, "samples c *grid"]
    residual: Float[Array, "samples *grid"]
    coefficients: Float[Array, "samples experts n"]
    jump: Float[Array, " samples"]
    warm: WarmStart
    lanes: LeastSquaresResult


class HardConstrained(eqx.Module):
    """A network that ends in an equation: its outputs are a basis, in which experts solve.

    `network(inputs)` gives n fields b_j on the grid, for one sample. Each expert k of the router
    gets the coefficients that solve

        min over w of  mean_i residual(u_k, x_i)^2 / 2 + ridge |w|^2 / 2,   u_k = lift + sum w_j b_j

    over collocation points x_i of its region, and the field is `u = sum_k weight_k u_k`. The layer
    is differentiable in the network and the inputs, by the implicit function theorem
    ([`batched_least_squares`][]). It is an Equinox module: train `layer.network`.

    - `joint`: solve for all experts of a sample together, with the residual of the field itself:

          min over all w_k of  mean_i residual(u, x_i)^2 / 2 + ridge sum_k |w_k|^2 / 2

      Channels are those of u, so that what is not local (a velocity that depends on the vorticity
      everywhere) comes from the whole field, and boxes that overlap need no ties. The functions
      `weight_k b_j` are differentiated with their weights: give these room to change, by an overlap
      of as many points as differences take. The work grows with the square of all coefficients.
    - `points`: how many collocation points each expert draws from its own, all by default. Joint
      experts draw as many in all, from the whole grid.
    - `faces`: the weight of jumps between neighbouring experts, squared and averaged over each face
      like residuals. All experts of a sample are then solved for together. With `None`, and
      without a `balance`, each expert is solved for alone.
    - `ridge`, `tolerance`, `adjoint_tolerance`, `hessian`, `solver`: of
      [`batched_least_squares`][]. `BatchedLevenbergMarquardt(sharding=...)` spreads experts over
      devices. The ridge keeps bases usable whose members depend on each other, as they do early in
      training.

    Source: Chalapathi, Du, Krishnapriyan (ICLR 2024, arXiv 2402.13412), with the residual itself in
    place of its square, and stationarity of the least squares as what is differentiated.

    >>> import equinox, jax.numpy as jnp, tolerax
    >>> x = jnp.linspace(0, 1, 41)
    >>> basis = lambda rate: jnp.stack([jnp.exp(-k * x / 2) - 1 for k in range(1, 7)])
    >>> slope = lambda u: jnp.gradient(u, x[1])
    >>> equation = tolerax.Equation(  # u' = -rate u, u(0) = 1
    ...     lambda u: jnp.stack([u, slope(u)]),
    ...     lambda z, rate: z[1] + rate * z[0],
    ...     data=lambda rate: rate,
    ...     lift=lambda rate: jnp.ones(41),
    ... )
    >>> layer = tolerax.HardConstrained(basis, equation, tolerax.Boxes((41,), (2,)), faces=10.0)
    >>> field = equinox.filter_jit(layer)(jnp.array([1.0, 2.0]))
    >>> (field.u[:, -1] - jnp.exp(-jnp.array([1.0, 2.0]))).round(2)
    Array([0., 0.], dtype=float64)
    """

    network: Any
    equation: Equation
    router: Router
    solver: LaneSolver
    ridge: Any
    tolerance: Any
    adjoint_tolerance: Any
    faces: Any
    own: tuple[np.ndarray, np.ndarray]
    shared: tuple[np.ndarray, np.ndarray]
    sides: tuple[np.ndarray, np.ndarray]
    joint: bool = eqx.field(static=True)
    counts: tuple[int, ...] = eqx.field(static=True)
    points: int | None = eqx.field(static=True)
    hessian: Hessian = eqx.field(static=True)

    def __init__(
        self,
        network: Callable[[Any], Any],
        equation: Equation,
        router: Router,
        *,
        joint: bool = False,
        points: int | None = None,
        faces: ArrayLike | None = None,
        ridge: ArrayLike = 1e-8,
        tolerance: ArrayLike = 1e-8,
        adjoint_tolerance: ArrayLike = 1e-10,
        hessian: Hessian = "exact",
        solver: LaneSolver | None = None,
    ):
        _check_points(points)
        if faces is not None and not router.pairs and router.experts > 1:
            raise ValueError(
                f"faces is {faces}, and {type(router).__name__} has no faces to tie: use "
                "Boxes with an axis without overlap, or faces=None."
            )
        if joint and faces is not None:
            raise ValueError(
                f"faces is {faces} and joint is True: joint experts are tied by the equation, "
                "leave one of the two out."
            )
        everywhere = equation.everywhere
        if everywhere is not None and np.shape(everywhere) != router.grid:
            raise ValueError(
                f"everywhere has shape {np.shape(everywhere)}: the router has the grid "
                f"{router.grid}."
            )
        _check_linear(equation.channels, router.grid)
        self.network, self.equation, self.router = network, equation, router
        self.points, self.faces, self.ridge = points, faces, ridge
        self.tolerance, self.adjoint_tolerance = tolerance, adjoint_tolerance
        self.hessian, self.joint = hessian, joint
        self.solver = solver or BatchedLevenbergMarquardt()
        leave_out = None if everywhere is None else np.asarray(everywhere, bool)
        own = router.members(leave_out)
        shared = np.zeros(0, int) if leave_out is None else np.flatnonzero(leave_out)
        self.counts = tuple(len(some) for some in own)
        own = [np.unique(np.concatenate(own))] if joint else own
        self.own, self.shared, self.sides = _padded(own), _padded([shared]), _padded(router.faces)

    @property
    def tied(self) -> bool:
        """Whether jumps at faces are among the rows."""
        return self.faces is not None and bool(self.router.pairs)

    @property
    def together(self) -> bool:
        """Whether the experts of a sample make one lane."""
        return self.joint or self.tied or self.equation.balance is not None

    def cold_start(self, samples: int, inputs: PyTree) -> WarmStart:
        """A warm start of zeros for so many samples like those of `inputs`."""
        basis = jax.eval_shape(jax.vmap(self.network), inputs)
        n = self._checked(basis, "network").shape[1]
        experts = self.router.experts
        return WarmStart.blank(samples, *((1, experts * n) if self.together else (experts, n)))

    def __call__(
        self,
        inputs: PyTree,
        *,
        key: PRNGKeyArray | None = None,
        points: int | None = None,
        tolerance: ArrayLike | None = None,
        warm: WarmStart | None = None,
        report: BackwardReport | None = None,
    ) -> Field:
        """Solve for each sample.

        - `inputs`: pytree with a leading axis of samples on every leaf. (Do not `vmap` the layer:
          lanes in one axis do not wait for each other.)
        - `key`: draws the collocation points; a fixed key by default. - `points`, `tolerance`: in
          place of the layer's own, for instance at inference. Where `points` exceeds what an
          expert has, it uses all.
        - `warm`: of an earlier answer on the same samples. Lanes in which coefficients of 0 leave
          squares of residuals a tenth as large start from there.
        - `report`: `BackwardReport.blank(samples * lanes)`: see [`batched_least_squares`][].
        """
        experts, grid = self.router.experts, self.router.grid
        outputs = self._checked(jax.vmap(self.network)(inputs), "network")
        b, n = outputs.shape[:2]
        shares = jax.lax.stop_gradient(self.router.weights)
        shares = jnp.asarray(shares, outputs.dtype)
        # What each of `groups` solves for, in the span of `basis`.
        groups, basis = experts, outputs
        if self.joint:
            basis = (shares[None, :, None] * outputs[:, None]).reshape(b, experts * n, *grid)
            groups, shares = 1, jnp.ones((1, *grid), outputs.dtype)
        shares = shares.reshape(groups, -1)
        Phi = jax.vmap(jax.vmap(self.equation.channels))(basis)
        if Phi.shape[:2] != basis.shape[:2] or Phi.ndim < 3 or Phi.shape[3:] != grid:
            raise ValueError(
                f"channels returned shape {Phi.shape[2:]} for a field of shape {grid}: give "
                f"(channels, *grid)."
            )
        c = Phi.shape[2]
        lift = jnp.zeros((b, *grid), basis.dtype)
        if self.equation.lift is not None:
            lift = jax.vmap(self.equation.lift)(inputs)
            if lift.shape != (b, *grid):
                raise ValueError(f"lift returned shape {lift.shape[1:]}: give the grid {grid}.")
        z0 = jax.vmap(self.equation.channels)(lift).reshape(b, c, -1)
        outputs = outputs.reshape(b, n, -1)
        basis, Phi = basis.reshape(*basis.shape[:2], -1), Phi.reshape(*Phi.shape[:3], -1)
        data = None if self.equation.data is None else jax.vmap(self.equation.data)(inputs)
        index, weight = self._collocated(key, points, n, basis.dtype)

        def at_points(values: Array, axis: int) -> Array:
            """Values on the grid at the points of each group."""
            if index is None:
                return jnp.expand_dims(values, axis)
            return values[(slice(None),) * axis + (index,)]

        def per_lane(leaf: Array) -> Array:
            """Data of those who solve, (b, groups, ...)."""
            if leaf.shape[1:] == grid:
                return at_points(leaf.reshape(b, -1), 1)
            return jnp.broadcast_to(leaf[:, None], (b, groups, *leaf.shape[1:]))

        # Coefficients last: points are then looked up, and their derivatives added, row by row.
        rows_first = at_points(jnp.moveaxis(Phi, 1, 3), 2)
        lanes = (
            jnp.swapaxes(rows_first, 1, 2),
            (
                jnp.swapaxes(at_points(z0, 2), 1, 2),
                jax.tree.map(per_lane, data),
                jnp.broadcast_to(weight, (b, *weight.shape)),
            ),
        )
        fresh = warm is None
        warm = self._started(warm, b, n, basis.dtype)
        rows = Pointwise(_Rows(self.equation.residual))
        options: dict[str, Any] = {
            "tolerance": self.tolerance if tolerance is None else tolerance,
            "adjoint_tolerance": self.adjoint_tolerance,
            "ridge": self.ridge,
            "solver": self.solver,
            "hessian": self.hessian,
            "report": report,
        }
        # Jumps are read off, never differentiated, unless they are rows.
        sides, real = self.sides
        jumps = jnp.swapaxes(outputs[..., jnp.asarray(sides)], 1, 2)
        jumps = jnp.swapaxes(jumps, 2, 3) * _averaged(real, basis.dtype)[None, :, :, None]
        if self.tied or self.equation.balance is not None:
            pairs = self.router.pairs if self.faces is not None else ()
            faces = jnp.zeros((b, 0, 0, warm.w.shape[2] // groups), basis.dtype)
            if pairs:
                faces = jumps * jnp.asarray(self.faces)
            fun = Tied(rows, pairs, groups)
            if self.equation.balance is not None:
                whole = (Phi, z0, inputs, jnp.broadcast_to(shares, (b, *shares.shape)))
                options["held"] = (_Balance(self.equation.balance, groups, grid), whole)
            given = (lanes, faces)
        else:
            fun = rows
            given = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lanes)
        start, radius = warm.w.reshape(-1, warm.w.shape[2]), warm.radius.ravel()
        if not fresh:
            start, radius = _safeguarded(fun, start, radius, given)
        found = batched_least_squares(fun, start, given, radius=radius, **options)
        w = found.w.reshape(b, groups, -1)
        u = jnp.einsum("kg,bkg->bg", shares, jnp.einsum("bkn,bng->bkg", w, basis))
        u = u.reshape(b, *grid) + lift
        z = _assembled(shares, w, Phi) + z0
        residual = self._everywhere(z, data, grid)
        w = w.reshape(b, experts, n)
        left, right = np.asarray(self.router.pairs, int).reshape(-1, 2).T
        apart = jnp.einsum("bpfn,bpn->bpf", jumps, w[:, left] - w[:, right])
        size = jnp.sqrt(jnp.mean(u.reshape(b, -1) ** 2, axis=1))
        jump = jnp.sqrt(jnp.sum(apart**2, axis=(1, 2)) / max(len(left), 1)) / size
        return Field(
            u=u,
            z=z.reshape(b, c, *grid),
            residual=residual,
            coefficients=w,
            jump=jax.lax.stop_gradient(jump),
            warm=jax.lax.stop_gradient(
                WarmStart(found.w.reshape(warm.w.shape), found.radius.reshape(warm.radius.shape))
            ),
            lanes=found,
        )

    def _checked(self, basis: Any, name: str) -> Any:
        """The basis, if it is one."""
        if basis.ndim < 2 or basis.shape[2:] != self.router.grid:
            raise ValueError(
                f"the {name} returned shape {basis.shape[1:]} for a sample: give n fields on the "
                f"grid, (n, *{self.router.grid})."
            )
        return basis

    def _started(self, warm: WarmStart | None, b: int, n: int, dtype: Any) -> WarmStart:
        experts = self.router.experts
        shape = (b, 1, experts * n) if self.together else (b, experts, n)
        if warm is None:
            return WarmStart(jnp.zeros(shape, dtype), jnp.full(shape[:2], jnp.inf, dtype))
        if warm.w.shape != shape:
            raise ValueError(f"warm has coefficients of shape {warm.w.shape}: this needs {shape}.")
        return WarmStart(warm.w.astype(dtype), warm.radius.astype(dtype))

    def _collocated(
        self, key: PRNGKeyArray | None, points: int | None, n: int, dtype: Any
    ) -> tuple[Int[Array, "k m"] | None, Float[Array, "k m"]]:
        """Collocation points of each expert and their weights: of the mean over its rows. `None`
        for the whole grid in its order: looking that up, and adding its derivatives, takes time."""
        _check_points(points)
        (own, real), (shared, _) = self.own, self.shared
        most = self.points if points is None else points
        rows = [min(count, most or count) + shared.shape[1] for count in self.counts]
        few = [k for k, count in enumerate(rows) if count < n]
        if few:
            raise ValueError(
                f"expert {few[0]} has {rows[few[0]]} points for {n} coefficients: give it at "
                f"least {n} (more points, fewer experts, or a network with fewer outputs)."
            )
        counts = self.counts
        if self.joint:
            counts, most = (own.shape[1],), None if most is None else most * len(counts)
        drawn = min(own.shape[1], most or own.shape[1])
        total = [min(count, drawn) + shared.shape[1] for count in counts]
        if self.joint and total[0] < self.router.experts * n:
            raise ValueError(
                f"joint experts have {total[0]} points for {self.router.experts * n} coefficients: "
                f"give them at least as many (more points, fewer experts, or a network with fewer "
                "outputs)."
            )
        if len(total) == 1 and drawn == math.prod(self.router.grid):
            return None, jnp.full(own.shape, 1 / math.sqrt(drawn), dtype)
        own, real = jnp.asarray(own), jnp.asarray(real)
        if drawn < own.shape[1]:
            key = jax.random.key(0) if key is None else key
            # What is padded comes last.
            order = jnp.argsort(jax.random.uniform(key, own.shape) + ~real, axis=1)[:, :drawn]
            own, real = (jnp.take_along_axis(a, order, 1) for a in (own, real))
        both = jnp.broadcast_to(jnp.asarray(shared), (len(total), shared.shape[1]))
        index = jnp.concatenate([own, both], axis=1)
        weight = jnp.concatenate([real, jnp.ones(both.shape, bool)], axis=1)
        return index, weight / jnp.sqrt(jnp.asarray(total, dtype))[:, None]

    def _everywhere(self, z: Array, data: PyTree, grid: tuple[int, ...]) -> Array:
        """The residual at every point."""
        at = lambda leaf: leaf.reshape(len(z), -1) if leaf.shape[1:] == grid else leaf  # noqa: E731
        rows = jax.vmap(_Rows(self.equation.residual))
        ones = jnp.ones(z.shape[::2], z.dtype)
        return rows(z, (jnp.zeros_like(z), jax.tree.map(at, data), ones)).reshape(-1, *grid)


def _check_points(points: int | None) -> None:
    if points is not None and points < 1:
        raise ValueError(f"points is {points}: give at least 1 for each expert, or None.")


def _check_linear(channels: Callable, grid: tuple[int, ...]) -> None:
    """Raise if channels are seen not to be linear, at two fields drawn at random."""
    u, v = jnp.asarray(np.random.default_rng(0).normal(size=(2, *grid)))
    apart, both = (channels(u), 2 * channels(v)), channels(u + 2 * v)
    if not is_concrete((apart, both)):
        return
    size = np.abs(apart[0]) + np.abs(apart[1])
    gap, most = np.max(np.abs(apart[0] + apart[1] - both)), np.max(size)
    if np.isfinite(most) and not gap <= 1e-3 * most:
        raise ValueError(
            "channels are not linear: those of u + 2 v are not those of u and twice those of v. "
            "Leave products, powers and constants to the residual."
        )


def _safeguarded(fun: Structured, w: Array, radius: Array, data: PyTree) -> tuple[Array, Array]:
    """Starts and radii of the lanes, from 0 where that leaves squares a tenth as large, since
    coefficients of another basis may lead to another minimum. It takes values only."""
    w, data = jax.lax.stop_gradient((w, data))
    squares = lambda w: jnp.sum(jnp.square(jax.vmap(fun)(w, data)), axis=1)  # noqa: E731
    worse = ~(0.1 * squares(w) <= squares(jnp.zeros_like(w)))
    return jnp.where(worse[:, None], 0, w), jnp.where(worse, jnp.inf, radius)


class _Rows(eqx.Module):
    """Weighted residuals of z + z0."""

    residual: Callable

    def __call__(self, z: Array, data: Any) -> Array:
        z0, data, weight = data
        r = self.residual(z + z0, data)
        if jnp.shape(r) != weight.shape:
            raise ValueError(
                f"the residual of the equation has shape {jnp.shape(r)} for channels of shape "
                f"{z.shape}: give one for each point, shape {weight.shape}."
            )
        return weight * r


class _Balance(eqx.Module):
    """The balance of the whole field as a function of all coefficients of a sample."""

    balance: Callable
    experts: int = eqx.field(static=True)
    grid: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, w: Array, data: Any) -> Array:
        Phi, z0, inputs, shares = data
        z = _assembled(shares, w.reshape(1, self.experts, -1), Phi[None])[0] + z0
        rows = jnp.ravel(self.balance(z.reshape(-1, *self.grid), inputs))
        if not 0 < rows.size < w.size:
            raise ValueError(
                f"balance returned {rows.size} numbers, and the experts of a sample have {w.size} "
                "coefficients: give at least 1 number, and fewer than coefficients."
            )
        return rows


def _assembled(shares: Array, w: Array, Phi: Array) -> Array:
    """`sum_k shares_k Phi w_k`, shape (b, c, points)."""
    total = jnp.zeros((w.shape[0], *Phi.shape[2:]), Phi.dtype)
    for k in range(shares.shape[0]):
        total = total + shares[k][None, None] * jnp.einsum("bn,bncg->bcg", w[:, k], Phi)
    return total


def _averaged(real: Any, dtype: Any) -> Array:
    """Weights of a mean over what is real in each row."""
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    return (real / jnp.sqrt(count)).astype(dtype)


def _padded(some: Any) -> tuple[np.ndarray, np.ndarray]:
    """Index lists of different lengths as one array, padded with what they begin with, and what of
    it is real."""
    width = max((len(one) for one in some), default=0)
    index = np.zeros((len(some), width), int)
    real = np.zeros((len(some), width), bool)
    for row, one in enumerate(some):
        if len(one):
            index[row] = one[0]
        index[row, : len(one)] = one
        real[row, : len(one)] = True
    return index, real
