"""Constants of a problem and where they come from: given, proved or estimated."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from tolerax._quantities import Origin
from tolerax.validation import is_concrete


class Proved(eqx.Module):
    """A constant with the reason why it holds; see [`proved`][]."""

    value: Any
    because: str = eqx.field(static=True)


def proved(value: Any, *, because: str) -> Proved:
    """Mark a constant as proved, with the reason.

    A plain value is "given" (the user answers for it), `proved(...)` is "proved", and `None` is
    "estimated" (measured on the fly and labelled so).

    >>> proved(1.0, because="the lower level is 1/2 |y - b|^2 plus a convex function").because
    'the lower level is 1/2 |y - b|^2 plus a convex function'
    """
    return Proved(value, because)


def constant(value: Any, *arguments: Any) -> Any:
    """The value of a constant at `arguments`: constants may be callables."""
    if isinstance(value, Proved):
        value = value.value
    return value(*arguments) if isinstance(value, Callable) else value


def check_constant(name: str, value: Any, positive: bool = False) -> None:
    """Raise for a constant that is a number, and one that it cannot be."""
    value = value.value if isinstance(value, Proved) else value
    if value is None or callable(value) or not is_concrete(value):
        return
    for leaf in jax.tree.leaves(value):
        try:
            numbers = np.asarray(leaf, float)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} is {leaf!r}: give a number or a callable of x.") from error
        # NaN is neither.
        if not np.all(numbers > 0 if positive else numbers >= 0):
            kind = "positive" if positive else "at least 0"
            raise ValueError(f"{name} is {leaf}: it must be {kind}, or None to be estimated.")


def origin(value: Any) -> Origin:
    """Where a constant comes from.

    >>> origin(None), origin(2.0), origin(proved(2.0, because="closed form"))
    ('estimated', 'given', 'proved')
    """
    if value is None:
        return "estimated"
    return "proved" if isinstance(value, Proved) else "given"
