"""Routers: which expert answers for which points of a regular grid."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import ArrayLike, Float, Int, PRNGKeyArray


class Router(eqx.Module):
    """A partition of unity on a regular grid: expert k has the weight `weights[k]` at each point,
    and answers for the points where it is positive.

    - `weights`: shape `(experts, *grid)`, not negative; at each point they sum to 1.
    - `faces`: for each pair of neighbours the points on both sides of the face between them, as
      indices into the flat grid; `pairs` says which two. A router without faces has none to tie.

    [`Boxes`][] and [`RandomAssignment`][] make the usual ones.

    >>> import numpy as np
    >>> ramp = np.linspace(0, 1, 5)
    >>> router = Router(np.stack([ramp, 1 - ramp]))
    >>> router.experts, router.counts
    (2, (4, 4))
    """

    weights: Float[np.ndarray, "experts *grid"]
    pairs: tuple[tuple[int, int], ...] = eqx.field(static=True, default=())
    faces: tuple[Int[np.ndarray, " f"], ...] = ()

    def __init__(self, weights: ArrayLike):
        self.weights = _partition(np.asarray(weights, float))

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.weights.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Points along every axis."""
        return self.weights.shape[1:]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many points each expert answers for."""
        return tuple(int(n) for n in np.sum(self.weights.reshape(self.experts, -1) > 0, axis=1))

    def members(self, leave_out: np.ndarray | None = None) -> list[Int[np.ndarray, " p"]]:
        """The points of every expert, as indices into the flat grid."""
        inside = self.weights.reshape(self.experts, -1) > 0
        if leave_out is not None:
            inside = inside & ~np.asarray(leave_out, bool).ravel()[None]
        return [np.flatnonzero(row) for row in inside]


class Boxes(Router):
    """Boxes side by side, `parts` of them along each axis of the grid; sizes differ by one point
    where the parts do not divide the points.

    - `overlap`: by how many points each box reaches into its neighbours, one number or one for each
      axis. Along axes with an overlap the weights blend, so that the field has no jumps and no face
      is left to tie; along others it has.
    - `periodic`: whether the last points have the first ones as neighbours, for all axes or for
      each of them.

    >>> boxes = Boxes((10, 4), (3, 1))
    >>> boxes.experts, boxes.counts, boxes.pairs
    (3, (16, 12, 12), ((0, 1), (1, 2)))
    >>> Boxes((10, 4), (3, 1), overlap=1).counts
    (20, 20, 16)
    >>> Boxes((10, 4), (3, 1), periodic=True).pairs
    ((0, 1), (1, 2), (2, 0))
    """

    def __init__(
        self,
        grid: Sequence[int],
        parts: Sequence[int],
        *,
        overlap: int | Sequence[int] = 0,
        periodic: bool | Sequence[bool] = False,
    ):
        grid, parts = tuple(grid), tuple(parts)
        if len(grid) != len(parts) or not grid:
            raise ValueError(f"parts is {parts}: give one number for each axis of the grid {grid}.")
        if any(p < 1 for p in parts):
            raise ValueError(f"parts is {parts}: give at least 1 along each axis.")
        if any(p > n for n, p in zip(grid, parts, strict=True)):
            raise ValueError(
                f"parts is {parts} on the grid {grid}: some boxes would be empty. Give at most as "
                "many parts as points along each axis."
            )
        reach, around = (
            _each_axis(*named, grid) for named in (("overlap", overlap), ("periodic", periodic))
        )
        if any(points < 0 for points in reach):
            raise ValueError(f"overlap is {overlap}: it must not be negative.")
        weights = np.ones((1, *[1] * len(grid)))
        for axis, (n, p) in enumerate(zip(grid, parts, strict=True)):
            shape = [1] * len(grid)
            shape[axis] = n
            hats = _hats(n, p, int(reach[axis]), bool(around[axis])).reshape(p, *shape)
            weights = (weights[:, None] * hats[None]).reshape(
                -1, *np.broadcast_shapes(weights.shape[1:], hats.shape[1:])
            )
        self.weights = _partition(weights)
        self.pairs, self.faces = _faces(self.weights, parts, reach, around)


class RandomAssignment(Router):
    """Every point belongs to an expert that is drawn at random: the control that tells what a
    partition into neighbourhoods is worth.

    >>> import jax
    >>> RandomAssignment((10, 4), 3, key=jax.random.key(0)).counts
    (14, 13, 13)
    """

    def __init__(self, grid: Sequence[int], experts: int, *, key: PRNGKeyArray):
        size = int(np.prod(grid))
        if not 1 <= experts <= size:
            raise ValueError(f"experts is {experts}: give at least 1, at most {size} points.")
        order = np.asarray(jax.random.permutation(key, size))
        owner = np.empty(size, int)
        owner[order] = np.arange(size) % experts
        weights = (owner[None] == np.arange(experts)[:, None]).reshape(experts, *grid)
        self.weights = _partition(weights.astype(float))


def _partition(weights: np.ndarray) -> np.ndarray:
    """The weights, if they are a partition of unity without empty parts."""
    if weights.ndim < 2:
        raise ValueError(f"weights has shape {weights.shape}: give (experts, *grid).")
    if not np.all(weights >= 0) or not np.allclose(weights.sum(axis=0), 1, atol=1e-6):
        raise ValueError(
            "weights are no partition of unity: they must not be negative, and sum to 1 over the "
            "experts at every point."
        )
    empty = [k for k, part in enumerate(weights) if not np.any(part > 0)]
    if empty:
        raise ValueError(f"experts {empty} have no points: leave them out.")
    return weights


def _each_axis(name: str, value: Any, grid: tuple[int, ...]) -> tuple:
    """The value for each axis."""
    values = (value,) * len(grid) if np.ndim(value) == 0 else tuple(value)
    if len(values) != len(grid):
        raise ValueError(f"{name} is {value}: give one for all axes or each of the grid {grid}.")
    return values


def _hats(n: int, parts: int, overlap: int, periodic: bool) -> np.ndarray:
    """Weights of the parts along one axis, shape (parts, n)."""
    if parts == 1:
        return np.ones((1, n))
    first = [int(piece[0]) for piece in np.array_split(np.arange(n), parts)]

    def rise(at: np.ndarray, start: int) -> np.ndarray:
        # From 0 to 1 over the points that both sides have.
        share = (at - start) / (2 * overlap) + 0.5 if overlap else (at > start).astype(float)
        s = np.clip(share, 0, 1)
        return s * s * (3 - 2 * s)

    at, hats = np.arange(n) + 0.5, []
    for start, end in zip(first, [*first[1:], n], strict=True):
        if periodic:
            hats.append(sum(rise(at + k, start) * (1 - rise(at + k, end)) for k in (-n, 0, n)))
        else:
            begun = rise(at, start) if start else np.ones(n)
            hats.append(begun * (1 - rise(at, end)) if end < n else begun)
    return np.stack(hats) / np.sum(hats, axis=0)


def _faces(
    weights: np.ndarray, parts: tuple[int, ...], reach: Sequence[int], periodic: Sequence[bool]
) -> tuple[tuple[tuple[int, int], ...], tuple[np.ndarray, ...]]:
    """Pairs of neighbours along axes where they do not overlap and, for each, the points on both
    sides of their face."""
    inside, grid = weights > 0, weights.shape[1:]
    index, boxes = np.arange(math.prod(grid)).reshape(grid), np.arange(len(weights)).reshape(parts)
    found: dict[tuple[int, int], np.ndarray] = {}
    for axis, count in enumerate(grid):
        if reach[axis] or parts[axis] == 1:
            continue
        ends = [n if periodic[axis] else n - 1 for n in (parts[axis], count)]
        low, high = (np.take(boxes, np.arange(ends[0]) + k, axis, mode="wrap") for k in (0, 1))
        here = np.arange(ends[1])
        for one, other in zip(low.ravel().tolist(), high.ravel().tolist(), strict=True):
            both = np.take(inside[one], here, axis)
            both = both & np.take(inside[other], here + 1, axis, mode="wrap")
            sides = [np.take(index, here + k, axis, mode="wrap")[both] for k in (0, 1)]
            found[one, other] = np.unique(np.concatenate(sides))
    pairs = tuple(sorted(found))
    return pairs, tuple(found[pair] for pair in pairs)
