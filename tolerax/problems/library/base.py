"""What every ready-made problem gives."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from tolerax.problems.bilevel import Bilevel


class LibraryProblem(eqx.Module):
    """A ready-made bilevel problem. Subclasses add what reporting needs.

    - `problem`: the [`tolerax.problems.Bilevel`][] to solve.
    - `x0`: where its benchmark starts.
    - `description`: data, levels, scaling and the origin of the constants, in a few lines.
    - `upper(y, x)`, `lower(y, x)`, `y0`, `constants`: what `problem` was made of, for other methods
      and for a `Bilevel` with other settings.
    """

    problem: Bilevel
    x0: PyTree
    description: str = eqx.field(static=True)
    upper: Callable
    lower: Callable
    y0: PyTree
    constants: dict[str, Any]


def assemble(
    upper: Callable, lower: Callable, y0: PyTree, options: dict[str, Any], **constants: Any
) -> dict[str, Any]:
    """The fields of a [`LibraryProblem`][] that belong to its levels. `options` win over constants,
    so that `strong_convexity=None` asks for an estimate in place of what is proved."""
    return {
        "problem": Bilevel(upper, lower, y0, **{**constants, **options}),
        "upper": upper,
        "lower": lower,
        "y0": y0,
        "constants": constants,
    }


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A NumPy generator: one seed gives independent streams for a split, noise, label flips.

    >>> bool(generator(0, "noise").normal() == generator(0, "split").normal())
    False
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed is {seed!r}: give an integer of at least 0.")
    return np.random.default_rng([int(seed), *purpose.encode()])


def check_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an integer within its limits, or an error that names the argument."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}: give an integer {limits}.")
    return int(value)


def check_real(name: str, value: Any, least: float, most: float = np.inf) -> float:
    """`value` as a float within its limits, or an error that names the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not (least <= number <= most and np.isfinite(number)):
        limits = f"of at least {least:g}" if np.isinf(most) else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} is {value!r}: give a number {limits}.")
    return number
