"""A pytree as a list of entries that can be written down, compared, and filled again."""

import dataclasses
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from tolerax.fingerprint import qualified_name, static_fingerprint

Entry = dict[str, Any]
_ARRAYS = np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct
# Exact text of each Python number, and back.
_NUMBERS = {
    bool: (str, {"True": True, "False": False}.__getitem__),
    int: (hex, lambda text: int(text, 16)),
    float: (
        lambda number: struct.pack(">d", number).hex(),
        lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    ),
    complex: (
        lambda number: struct.pack(">dd", number.real, number.imag).hex(),
        lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
    ),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of kind "array", "key" (typed random keys), "number" (of Python) or "static"."""

    name: str
    kind: str
    value: Any

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what is stored."""
        return self.value.shape if self.kind == "array" else _key_data(self.value).shape

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of what is stored: npz does not know bfloat16 and its like, only their bits."""
        if self.kind == "key":
            return _key_data(self.value).dtype
        dtype = np.dtype(self.value.dtype)
        return np.dtype(f"u{dtype.itemsize}") if _is_extended(dtype) else dtype

    def to_host(self) -> np.ndarray:
        """What is stored."""
        value = _key_data(self.value) if self.kind == "key" else self.value
        return np.asarray(value, order="C").view(self.stored_dtype)

    def restored(self, stored: np.ndarray) -> Any:
        """A leaf like this one, with what was stored."""
        if self.kind == "key":
            impl = jax.random.key_impl(self.value)
            return self._placed(jax.random.wrap_key_data(jnp.asarray(stored), impl=impl))
        array = stored.view(self.value.dtype)
        if isinstance(self.value, np.ndarray):
            return array
        if isinstance(self.value, np.generic):
            return array[()]
        return self._placed(array)

    def _placed(self, array: Any) -> jax.Array:
        if getattr(self.value, "committed", False):
            placed = jax.device_put(array, self.value.sharding)
        else:
            placed = jnp.asarray(array)
        if placed.dtype != array.dtype:
            raise TypeError(
                f"{self.name} is {array.dtype}, which JAX makes {placed.dtype} of: enable 64 bits "
                'with `jax.config.update("jax_enable_x64", True)`.'
            )
        return placed


class Described:
    """What a pytree holds.

    - `entries`: of JSON types, one for each leaf, node and static field, in order of flattening.
    - `arrays`, `numbers`: the leaves to store, numbers as text; static leaves are not stored.
    """

    def __init__(self, tree: PyTree):
        self.entries: list[Entry] = []
        self.leaves: list[Leaf] = []
        self._visit(tree, ())
        self._structure = jax.tree.structure(tree)
        self.arrays = [leaf for leaf in self.leaves if leaf.kind in ("array", "key")]
        self.numbers = [
            _NUMBERS[type(leaf.value)][0](leaf.value)
            for leaf in self.leaves
            if leaf.kind == "number"
        ]

    def parsed(self, texts: list[str]) -> list[Any]:
        """Numbers of the types that `numbers` have, from text."""
        leaves = [leaf for leaf in self.leaves if leaf.kind == "number"]
        return [
            _NUMBERS[type(leaf.value)][1](text) for leaf, text in zip(leaves, texts, strict=True)
        ]

    def restored(self, arrays: list[np.ndarray], numbers: list[Any]) -> PyTree:
        """The pytree with these in place of its arrays and numbers."""
        next_array, next_number = iter(arrays), iter(numbers)

        def fill(leaf: Leaf) -> Any:
            if leaf.kind == "static":
                return leaf.value
            if leaf.kind == "number":
                return next(next_number)
            return leaf.restored(next(next_array))

        return jax.tree.unflatten(self._structure, [fill(leaf) for leaf in self.leaves])

    def _visit(self, node: Any, path: tuple[Any, ...]) -> None:
        name = jax.tree_util.keystr(path).removeprefix(".")
        if isinstance(node, _ARRAYS):
            entry = _array_entry(name or "the tree", node)
            self._add(entry, node)
            return
        if type(node) in _NUMBERS:
            self._add({"path": name, "kind": "number", "type": type(node).__name__}, node)
            return
        children, structure = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        if len(children) == 1 and children[0][1] is node:
            self._add(_static_entry(name, node), node)
            return
        self.entries.append({"path": name, "kind": "node", "type": qualified_name(type(node))})
        for label, value in _static_parts(node, [key for key, _ in children], structure):
            self.entries.append(_static_entry(f"{name}.{label}".removeprefix("."), value))
        for key, child in children:
            self._visit(child, path + key)

    def _add(self, entry: Entry, value: Any) -> None:
        self.entries.append(entry)
        self.leaves.append(Leaf(entry["path"], entry["kind"], value))


def difference(saved: list[Entry], needed: list[Entry]) -> str | None:
    """The first difference, in words, or `None`.

    >>> saved = Described({"memory": np.zeros((10, 640))}).entries
    >>> difference(saved, Described({"memory": np.zeros((5, 640))}).entries)
    "the checkpoint has ['memory']: float64 of shape (10, 640), this run needs float64 of shape ..."
    """
    saved_paths = {entry["path"] for entry in saved}
    for old, new in zip(saved, needed, strict=False):
        if _essence(old) == _essence(new):
            continue
        if old["path"] == new["path"]:
            return f"the checkpoint has {_place(old)}: {_text(old)}, this run needs {_text(new)}"
        return _missing(new) if new["path"] not in saved_paths else _surplus(old)
    common = min(len(saved), len(needed))
    if len(saved) == len(needed):
        return None
    return _surplus(saved[common]) if len(saved) > common else _missing(needed[common])


def _missing(new: Entry) -> str:
    return f"this run needs {_place(new)}: {_text(new)}, which the checkpoint has not"


def _surplus(old: Entry) -> str:
    return f"the checkpoint has {_place(old)}: {_text(old)}, which this run has not"


def _essence(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name != "text"}


def _place(entry: Entry) -> str:
    return entry["path"] or "the whole tree"


def _text(entry: Entry) -> str:
    match entry:
        case {"kind": "array", "dtype": dtype, "shape": shape}:
            return f"{dtype} of shape {tuple(shape)}"
        case {"kind": "key", "impl": impl, "shape": shape}:
            return f"{impl} random key of shape {tuple(shape)}"
        case {"kind": "number", "type": kind}:
            return f"a Python {kind}"
        case {"kind": "node", "type": kind}:
            return "None" if kind == "builtins.NoneType" else f"a {kind}"
        case {"kind": "static", "text": text}:
            return text
    return repr(entry)


def _array_entry(name: str, array: Any) -> Entry:
    path = "" if name == "the tree" else name
    if isinstance(array, Tracer):
        raise TypeError(f"{name} is traced: checkpoints are saved and loaded outside of jit.")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{name} lies partly on devices of other processes: gather it first, and save from one "
            "process."
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        if isinstance(array, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is the shape of a random key: a template needs a real key.")
        impl = str(jax.random.key_impl(array))
        return {"path": path, "kind": "key", "impl": impl, "shape": list(array.shape)}
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biufc" and not _is_extended(dtype):
        raise TypeError(
            f"{name} has dtype {dtype}: only numbers and booleans are saved. Keep other data out "
            "of the state, or in static fields."
        )
    return {"path": path, "kind": "array", "dtype": str(dtype), "shape": list(array.shape)}


def _static_entry(path: str, value: Any) -> Entry:
    digits = static_fingerprint(value)[:16]
    if value is None or isinstance(value, bool | int | float | complex | str):
        text = repr(value)[:80]
    else:
        text = f"{qualified_name(value)} (fingerprint {digits})"
    return {"path": path, "kind": "static", "fingerprint": digits, "text": text}


def _static_parts(node: Any, keys: list[Any], structure: Any) -> list[tuple[str, Any]]:
    """What a node holds beside its children, by name."""
    if node is None or type(node) in (tuple, list, dict) or hasattr(node, "_fields"):
        return []  # named by the paths of the children
    if dataclasses.is_dataclass(node):
        dynamic = {getattr(key[0], "name", None) for key in keys}
        names = [field.name for field in dataclasses.fields(node) if field.name not in dynamic]
        return [(name, getattr(node, name)) for name in names if hasattr(node, name)]
    return [("<structure>", structure.node_data()[1])]


def _key_data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def _is_extended(dtype: np.dtype) -> bool:
    """Whether this is a dtype that JAX adds to those of NumPy."""
    return dtype.isbuiltin == 2 and jnp.issubdtype(dtype, np.number)
