"""Checks before a run starts: a clear error that names the argument, the value and the remedy."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def is_concrete(tree: PyTree) -> bool:
    """Whether no leaf is a tracer, so that values can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def traced_floats(tree: PyTree) -> PyTree:
    """Python floats as (weakly typed) arrays, so that another tolerance does not compile again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if type(leaf) is float else leaf, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or ""


def check_start(x0: PyTree) -> PyTree:
    """`x0` as a pytree of floating-point JAX arrays of one dtype."""
    leaves = jax.tree_util.tree_leaves_with_path(x0)
    if not leaves or sum(np.size(leaf) for _, leaf in leaves) == 0:
        raise ValueError("x0 is empty: give at least one variable.")
    dtypes = {}
    for path, leaf in leaves:
        try:
            dtype = jnp.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype
        except TypeError as error:
            raise TypeError(
                f"x0{_name(path)} is {leaf!r}, not an array: x0 must be a pytree of float arrays."
            ) from error
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"x0{_name(path)} is complex ({dtype}): optimize real and imaginary parts as two "
                "real arrays."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"x0{_name(path)} has dtype {dtype}: cast it to a floating-point type, for "
                "instance with `jnp.asarray(x0, float)`."
            )
        if jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"x0{_name(path)} has dtype {dtype}, too few digits to optimize in: cast it to "
                "float32 with `jnp.asarray(x0, jnp.float32)`; what the objective computes with may "
                "stay in half precision."
            )
        dtypes[_name(path)] = jax.dtypes.canonicalize_dtype(dtype)
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"x0{name}: {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"the leaves of x0 have different dtypes ({listed}): cast them to one.")
    return jax.tree.map(jnp.asarray, x0)


_RANGES = {
    "positive": ("be positive", lambda number: number > 0),
    "at_least_0": ("not be negative", lambda number: number >= 0),
    "at_least_1": ("be at least 1", lambda number: number >= 1),
    "below_1": ("lie between 0 and 1", lambda number: (number > 0) & (number < 1)),
    "up_to_1": ("lie between 0 and 1, or be 1", lambda number: (number > 0) & (number <= 1)),
}


def check_options(options: Any, **ranges: str) -> None:
    """Raise for attributes of `options` that are outside their ranges. `None`, and what is traced,
    is believed; arrays have to be within in every entry.

    - `ranges`: for each range the names of the options in it, separated by spaces.
    """
    for kind, names in ranges.items():
        must, holds = _RANGES[kind]
        for name in names.split():
            value = getattr(options, name)
            if value is None or not is_concrete(value):
                continue
            try:
                inside = np.all(holds(np.asarray(value)))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} is {value!r}: give a number.") from error
            if not inside:
                raise ValueError(f"{name} is {value}: it must {must}.")


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """The integer; raises for what is none, or smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}: give an integer of at least {least}.")
    return int(value)


def one_dtype(tree: PyTree, name: str) -> None:
    """Raise for leaves of different dtypes; the tree is called `name`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dtypes = {_name(path): jnp.result_type(leaf) for path, leaf in leaves}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name}{path}: {dtype}" for path, dtype in dtypes.items())
        raise TypeError(f"dtypes differ ({listed}): cast the arrays to one.")


def check_bounds(
    bounds: tuple[PyTree, PyTree] | None, x0: PyTree, *, name: str = "bounds"
) -> tuple[PyTree, PyTree] | None:
    """Bounds as a pair of pytrees like `x0`, or `None` when nothing is bounded; x0 must lie within
    them."""
    if bounds is None:
        return None
    lower, upper = bounds_like(bounds, x0, name=name)
    # Within jit what is broadcast is traced, but not what was given.
    low, high = (_aligned(bounds, x0, which, name, "x0") for which in (0, 1))
    if is_concrete((low, high, x0)):
        _check_inside(low, high, x0, name)
    return lower, upper


def bounds_like(
    bounds: tuple[PyTree, PyTree], tree: PyTree, *, name: str = "bounds", of: str = "x0"
) -> tuple[PyTree, PyTree]:
    """Bounds as a pair of pytrees like `tree`, which is called `of`."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"{name} must be a pair (lower, upper) of pytrees like {of} or scalars, got {bounds!r}."
        )
    low, high = (_aligned(bounds, tree, which, name, of) for which in (0, 1))

    def broadcast(side: PyTree, which: str) -> PyTree:
        try:
            return jax.tree.map(
                lambda b, leaf: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), side, tree
            )
        except ValueError as error:
            raise ValueError(f"{name}: the {which} bound does not fit {of}: {error}") from error

    lower, upper = broadcast(low, "lower"), broadcast(high, "upper")
    check_order(low, high, name)
    return lower, upper


def _aligned(bounds: Any, tree: PyTree, which: int, name: str, of: str) -> PyTree:
    """One of two bounds as a pytree of the structure of `tree`; leaves as they were given."""
    side, called = bounds[which], ("lower", "upper")[which]
    if side is None:
        raise ValueError(f"{name}: the {called} bound is None: use -inf or inf for no bound.")
    with contextlib.suppress(ValueError):  # a number may stand for a whole subtree
        side = jax.tree.map(
            lambda b, part: b if jnp.ndim(b) else jax.tree.map(lambda _: b, part), side, tree
        )
    if jax.tree.structure(side) != jax.tree.structure(tree):
        raise ValueError(
            f"{name}: the {called} bound has structure {jax.tree.structure(side)}, {of} has "
            f"{jax.tree.structure(tree)}: give a scalar or a pytree like {of}."
        )
    return side


def check_order(lower: PyTree, upper: PyTree, name: str) -> None:
    """Raise for bounds, two pytrees alike, that hold NaN or are the wrong way round."""
    if is_concrete((lower, upper)):
        for path, (low, high) in _pairs(lower, upper):
            low, high = np.broadcast_arrays(low, high)
            if np.isnan(low).any() or np.isnan(high).any():
                raise ValueError(f"{name}{path} holds NaN: use -inf and inf for no bound.")
            if (low > high).any():
                where = np.argwhere(low > high)[0]
                at = tuple(int(i) for i in where)
                raise ValueError(
                    f"{name}{path}: the lower bound {low[at]} at index {at} is above the upper "
                    f"bound {high[at]}: swap or widen them."
                )


def check_like(name: str, found: PyTree, like: PyTree, of: str) -> None:
    """Raise unless what `name` returns (arrays or their shapes) is a pytree like `like`, which is
    called `of`, with the same shapes."""
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (found, like)]
    if jax.tree.structure(found) != jax.tree.structure(like) or shapes[0] != shapes[1]:
        shown = [eqx.tree_pformat(tree, struct_as_array=True) for tree in (found, like)]
        raise ValueError(
            f"{name} returns {shown[0]}, but {of} is {shown[1]}: return a pytree like {of}, with "
            "the same shapes."
        )


def _pairs(lower: PyTree, upper: PyTree) -> list:
    lows = jax.tree_util.tree_leaves_with_path(lower)
    highs = jax.tree.leaves(upper)
    return [
        (_name(path), (np.asarray(low), np.asarray(high)))
        for (path, low), high in zip(lows, highs, strict=True)
    ]


def _check_inside(lower: PyTree, upper: PyTree, x0: PyTree, name: str) -> None:
    for (path, (low, high)), x in zip(_pairs(lower, upper), jax.tree.leaves(x0), strict=True):
        x = np.asarray(x)
        low, high = (np.broadcast_to(side.astype(x.dtype), x.shape) for side in (low, high))
        outside = (x < low) | (x > high)
        if outside.any():
            at = tuple(int(i) for i in np.argwhere(outside)[0])
            raise ValueError(
                f"x0{path} is {x[at]} at index {at}, outside its {name} [{low[at]}, {high[at]}]: "
                "move it inside, for instance with `jnp.clip`."
            )
