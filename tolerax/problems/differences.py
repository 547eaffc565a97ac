"""Gradients of Python code by differences of its values, with an estimate of their error.

Forward differences cost one value a variable and lose half of the digits; central differences cost
two and keep two thirds of them. Codes of this kind start with the first and turn to the second
where the first no longer tell anything (Gill, Murray, Saunders, Wright 1983); here the requested
tolerance decides.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Difference(NamedTuple):
    """A gradient, an estimate of its Euclidean error, and how many values it took."""

    gradient: np.ndarray
    error: float
    calls: int


class _Line:
    """Values at `x + step`, within the bounds, counted."""

    def __init__(self, fun: Callable, x: np.ndarray, lower: np.ndarray, upper: np.ndarray):
        self.fun, self.x = fun, x
        self.calls = 0
        self.room = {-1: x - lower, 1: upper - x}

    def at(self, moved: np.ndarray) -> float:
        self.calls += 1
        return self.fun(moved)

    def along(self, i: int, step: float) -> tuple[float, float]:
        """The value at `x + step e_i`, and the step that was really taken after rounding."""
        moved = self.x.copy()
        moved[i] += step
        taken = float(moved[i]) - float(self.x[i])
        return (self.at(moved), taken) if taken else (np.nan, 0.0)


def differences(
    fun: Callable[[np.ndarray], float],
    x: np.ndarray,
    value: float,
    *,
    precision: float,
    lower: np.ndarray,
    upper: np.ndarray,
    tolerance: float = np.inf,
    central: bool = False,
) -> Difference:
    """The gradient of `fun` at `x` (shape `(n,)`), where it is `value`.

    - `precision`: relative precision of the values.
    - `lower`, `upper`: no value is taken outside; a variable without room gets the entry 0.
    - `tolerance`: forward differences are followed by central ones when their error is larger.
    - `central`: begin with central differences.

    Where a value is not finite the other side is tried; the entry is NaN when that fails too.

    >>> parabola = lambda x: float(x @ x)
    >>> wide = np.full(2, np.inf)
    >>> x = np.array([1.0, -2.0])
    >>> differences(parabola, x, 5.0, precision=2e-16, lower=-wide, upper=wide).gradient.round(6)
    array([ 2., -4.])
    """
    line = _Line(fun, x, lower, upper)
    forward = None
    if not central:
        forward = _forward(line, value, precision)
        if np.isfinite(forward.error) and forward.error <= tolerance:
            return forward
    best = _central(line, value, precision)
    if forward is not None and forward.error < best.error:
        best = forward
    return best._replace(calls=line.calls)


def _sides(i: int, line: _Line, step: float) -> list[int]:
    """Both directions, the better one first. Signs alternate over the variables, so that in the
    check of all steps together mixed second derivatives mostly cancel."""
    sign = -1 if i % 2 else 1
    return sorted((sign, -sign), key=lambda side: -min(line.room[side][i], step))


def _forward(line: _Line, value: float, precision: float) -> Difference:
    x = line.x
    n = x.size
    steps = np.sqrt(precision) * np.maximum(1.0, np.abs(x))
    gradient, taken, change = np.zeros(n), np.zeros(n), np.zeros(n)
    for i in range(n):
        for side in _sides(i, line, steps[i]):
            step = side * min(steps[i], line.room[side][i])
            if not step:
                continue
            there, taken[i] = line.along(i, step)
            change[i] = there - value
            gradient[i] = change[i] / taken[i] if taken[i] else np.nan
            if np.isfinite(gradient[i]):
                break
    moves = taken != 0
    if not moves.any():
        return Difference(gradient, 0.0, line.calls)
    if not change[moves].any():
        # Either a stationary point or values too coarse for the step: only wider steps can tell.
        return Difference(gradient, np.inf, line.calls)
    # One value on the other side of all steps: f(x - s) - f + sum of changes = s'Hs/2 + half the
    # trace of H weighted by s^2, which shows the truncation error and any noise in the values.
    other = np.where(taken > 0, line.room[-1], line.room[1])
    back = moves & (other >= np.abs(taken))
    moved = x - np.where(back, taken, 0).astype(x.dtype)
    seen = line.at(moved) - value + change[back].sum() if back.any() else 0.0
    width = np.abs(taken[moves])
    size = np.max(np.abs(change)) + abs(value)
    rounding = 2 * precision * size * np.linalg.norm(1 / width)
    error = abs(seen) / width.min() + rounding
    return Difference(gradient, float(error) if np.isfinite(error) else np.inf, line.calls)


def _central(line: _Line, value: float, precision: float) -> Difference:
    x = line.x
    n = x.size
    scale = np.maximum(1.0, np.abs(x))
    steps = np.cbrt(precision) * scale
    gradient, curvature, flat = np.zeros(n), np.zeros(n), True
    moves = np.zeros(n, bool)
    for i in range(n):
        room = (line.room[-1][i], line.room[1][i])
        stencils = [(-steps[i], steps[i])] if min(room) >= steps[i] else []
        for side in _sides(i, line, 2 * steps[i]):
            half = side * min(steps[i], line.room[side][i] / 2)
            stencils += [(half, 2 * half)] if half else []
        for first, second in stencils:
            moves[i] = True
            (f1, h1), (f2, h2) = line.along(i, first), line.along(i, second)
            if not (h1 and h2 and h1 != h2):
                gradient[i] = np.nan
                continue
            # The parabola through three values: slope and curvature at x.
            d1, d2 = (f1 - value) / h1, (f2 - value) / h2
            gradient[i] = (d1 * h2 - d2 * h1) / (h2 - h1)
            curvature[i] = 2 * (d2 - d1) / (h2 - h1)
            flat = flat and f1 == f2 == value
            if np.isfinite(gradient[i]):
                break
    if not moves.any():
        return Difference(gradient, 0.0, line.calls)
    width = steps[moves].min()
    if flat:
        # Nothing changed anywhere: the values may be as coarse as their own size.
        return Difference(gradient, max(1.0, abs(value)) / width, line.calls)
    # A short step along all variables together: what the parabolas do not foresee is noise. Its
    # lengths are irregular, so that the changes of symmetric functions do not cancel.
    short = np.sqrt(precision) * scale * (0.5 + 0.5 * (0.618 * np.arange(n) % 1))
    signs = np.array([_sides(i, line, short[i])[0] for i in range(n)])
    fits = np.where(signs > 0, line.room[1], line.room[-1]) >= short
    moved = x + np.where(moves & fits, signs * short, 0).astype(x.dtype)
    d = moved.astype(float) - x
    seen = line.at(moved) - value
    noise = abs(seen - gradient @ d - 0.5 * curvature @ d**2)
    noise = max(noise if np.isfinite(noise) else 0.0, 2 * precision * abs(value))
    truncation = np.linalg.norm(steps**2 * curvature / scale)
    error = truncation + noise * np.sqrt(n) / width
    return Difference(gradient, float(error) if np.isfinite(error) else np.inf, line.calls)


def jacobian_by_differences(
    fun: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    values: np.ndarray,
    *,
    lower: np.ndarray,
    upper: np.ndarray,
    central: bool = False,
) -> np.ndarray:
    """The Jacobian, shape `(m, n)`, of `fun` at `x` (shape `(n,)`), where it is `values` (`(m,)`).

    - `lower`, `upper`: nothing is evaluated outside; a variable without room gets zeros.
    - `central`: differences of second order, two evaluations a variable in place of one.

    Where values are not finite the other side is tried; the column is NaN when that fails too.

    >>> wide = np.full(2, np.inf)
    >>> squares = lambda x: np.array([x @ x])
    >>> x = np.array([1.0, -2.0])
    >>> jacobian_by_differences(squares, x, squares(x), lower=-wide, upper=wide).round(6)
    array([[ 2., -4.]])
    """
    eps = np.finfo(x.dtype).eps
    steps = (np.cbrt(eps) if central else np.sqrt(eps)) * np.maximum(1.0, np.abs(x))
    jacobian = np.zeros((values.size, x.size), x.dtype)
    for i, step in enumerate(steps):
        room = {-1: x[i] - lower[i], 1: upper[i] - x[i]}
        sides = sorted((1, -1), key=lambda side: -min(room[side], step))
        stencils = [(side * min(step, room[side]),) for side in sides if room[side] > 0]
        if central:
            both = [(-step, step)] if min(room.values()) >= step else []
            stencils = both + [(first / 2, first) for (first,) in stencils]
        for stencil in stencils:
            moves, slopes = [], []
            for distance in stencil:
                moved = x.copy()
                moved[i] += distance
                moves.append(float(moved[i]) - float(x[i]))
                slopes.append((fun(moved) - values) / (moves[-1] or np.nan))
            column = slopes[0]
            if central:
                column = (slopes[0] * moves[1] - slopes[1] * moves[0]) / (moves[1] - moves[0])
            jacobian[:, i] = column
            if np.all(np.isfinite(column)):
                break
    return jacobian


def flat_bounds(bounds: Any, leaves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A pair of pytrees of bounds (or scalars, or `None`) as two vectors for the raveled leaves."""

    def vector(side: Any) -> np.ndarray:
        parts = [np.asarray(part) for part in jax.tree.leaves(side)]
        if len(parts) == 1 and parts[0].ndim == 0:
            parts = parts * len(leaves)
        fitted = [
            np.broadcast_to(part, leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
        ]
        return np.concatenate([part.ravel() for part in fitted])

    lower, upper = (-np.inf, np.inf) if bounds is None else bounds
    return vector(lower), vector(upper)
