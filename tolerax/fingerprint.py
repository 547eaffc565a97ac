"""A short name for the content of an object that is the same in every process."""

import dataclasses
import enum
import functools
import hashlib
import os
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def fingerprint(tree: Any) -> str:
    """32 hexadecimal digits that name a problem or a solver: equal content, equal digits.

    - Arrays count with dtype, shape and every bit; scalars and strings with their value; modules,
      dataclasses and other pytrees with their class and all fields, static ones too (but those
      declared with `compare=False`, which say how and not what).
    - Functions count with their qualified name, their compiled code, and the arrays, scalars,
      strings, functions and modules that they close over or have as defaults. What their code
      finds by name when it is called (globals), and lists or dictionaries that they close over
      (often logs of their calls), do not count.
    - Other objects count with the name of their class, and with the code of its `__call__`.

    Nothing depends on memory addresses, on Python's randomized hashes or on the lines of a file.

    >>> import jax.numpy as jnp, numpy as np
    >>> fingerprint({"x": jnp.arange(3.0)}) == fingerprint({"x": np.arange(3.0)})
    True
    >>> fingerprint({"x": jnp.arange(3.0)}) == fingerprint({"x": jnp.arange(4.0)})
    False
    """
    return _Reader(closures=True).read(tree).hex()[:32]


def static_fingerprint(value: Any) -> str:
    """As `fingerprint`, but functions count with their qualified name only."""
    return _Reader(closures=False).read(value).hex()[:32]


def qualified_name(value: Any) -> str:
    """Module and qualified name of a class or function, or of the class of another object.

    >>> qualified_name(fingerprint), qualified_name(3)
    ('tolerax.fingerprint.fingerprint', 'builtins.int')
    """
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        value = type(value)
        name = value.__qualname__
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name


def code(function: Any) -> bytes:
    """A digest of the compiled code of a function, the same wherever its source stands; that of
    nothing where it has none."""
    while callable(getattr(function, "__wrapped__", None)):
        function = function.__wrapped__
    digest = hashlib.sha256()

    def read(code: types.CodeType) -> None:
        digest.update(code.co_code + repr(code.co_names).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                read(constant)
            elif isinstance(constant, frozenset):
                digest.update(repr(sorted(map(repr, constant))).encode())
            else:
                digest.update(repr(constant).encode())

    compiled = getattr(function, "__code__", None)
    if isinstance(compiled, types.CodeType):
        read(compiled)
    return digest.digest()


def _join(kind: str, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


class _Reader:
    def __init__(self, closures: bool):
        self.closures = closures
        self.open: list[int] = []  # ids of what is being read, to end cycles

    def read(self, value: Any) -> bytes:
        if isinstance(value, enum.Enum):
            return _join("enum", qualified_name(type(value)).encode(), value.name.encode())
        if isinstance(value, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct):
            return self.array(value)
        # The repr of a float or complex number is exact.
        scalars = (
            bool | int | float | complex | str | bytes | range | slice | np.dtype | os.PathLike
        )
        if value is None or value is Ellipsis or isinstance(value, scalars):
            return _join("value", type(value).__name__.encode(), repr(value).encode())
        if id(value) in self.open:
            return _join("cycle", str(len(self.open) - self.open.index(id(value))).encode())
        self.open.append(id(value))
        try:
            return self.compound(value)
        finally:
            self.open.pop()

    def array(self, value: Any) -> bytes:
        head = f"{value.dtype}{tuple(value.shape)}".encode()
        if isinstance(value, Tracer | jax.ShapeDtypeStruct):
            return _join("shape", head)
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value, order="C")
        if array.dtype.hasobject:
            return _join("objects", head, *(self.read(item) for item in array.ravel().tolist()))
        return _join("array", head, array.reshape(-1).view(np.uint8).data)

    def compound(self, value: Any) -> bytes:
        name = qualified_name(value).encode()
        if isinstance(value, type):
            # The numbers of an enumeration mean something else when its names change.
            names = getattr(value, "_name_to_item", {}) if isinstance(value, _Enumeration) else {}
            return _join("class", name, *(item.encode() for item in names))
        if isinstance(value, types.ModuleType):
            return _join("module", value.__name__.encode())
        if isinstance(value, types.MethodType):
            return _join("method", name, self.read(value.__self__), self.read(value.__func__))
        if isinstance(value, types.FunctionType):
            return self.function(value)
        kind = qualified_name(type(value)).encode()
        if isinstance(value, dict):
            items = sorted(_join("item", self.read(k), self.read(v)) for k, v in value.items())
            return _join("dict", kind, *items)
        if isinstance(value, tuple | list):
            return _join("sequence", kind, *map(self.read, value))
        if isinstance(value, set | frozenset):
            return _join("set", kind, *sorted(map(self.read, value)))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return _join("partial", kind, *map(self.read, parts))
        if dataclasses.is_dataclass(value):
            fields = [f for f in dataclasses.fields(value) if f.compare]
            names = [f.name for f in fields if hasattr(value, f.name)]
            parts = [part for name in names for part in (name, getattr(value, name))]
            return _join("dataclass", kind, self.called(value), *map(self.read, parts))
        if callable(getattr(value, "__wrapped__", None)):  # jax.jit, jax.custom_jvp, ...
            return _join("wrapper", kind, self.read(value.__wrapped__))
        children, structure = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
        if not (len(children) == 1 and children[0] is value):
            node = structure.node_data()
            auxiliary = None if node is None else node[1]
            return _join("node", kind, self.read(auxiliary), *map(self.read, children))
        return _join("object", kind, name, self.called(value))

    def called(self, value: Any) -> bytes:
        """What an object does when it is called."""
        return code(type(value).__call__) if self.closures and callable(value) else b""

    def function(self, value: types.FunctionType) -> bytes:
        name = qualified_name(value).encode()
        if not self.closures:
            return _join("function", name)
        captured = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            try:
                captured.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                captured.append(None)
        return _join("function", name, code(value), *map(self.captured, captured))

    def captured(self, value: Any) -> bytes:
        if isinstance(value, list | dict | set | bytearray):
            return _join("mutable", qualified_name(type(value)).encode())
        return self.read(value)


_Enumeration = type(eqx.Enumeration)

__all__ = ["fingerprint", "qualified_name", "static_fingerprint"]
