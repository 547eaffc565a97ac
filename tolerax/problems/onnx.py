"""Networks from ONNX files."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tolerax.problems.onnx_operators import OPERATORS

OLDEST = 7  # operator set
LARGEST = 2**32  # entries of a value


class Node(NamedTuple):
    """One operator of a graph. Nothing in it is traced, so that shapes are known."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]

    def run(self, version: int, values: dict[str, Any]) -> None:
        """Add the outputs to the values. Raises ValueError, with the operator and its output."""
        attributes = {name: _thawed(value) for name, value in self.attributes}
        attributes["outputs"] = len(self.outputs)
        given = [values[name] if name else None for name in self.inputs]
        try:
            found = OPERATORS[self.operator](attributes, version, *given)
            found = found if isinstance(found, tuple) else (found,)
            if any(np.size(value) > LARGEST for value in found):
                raise ValueError(f"a value of more than {LARGEST} entries.")
        except Exception as error:
            shapes = ", ".join("none" if v is None else str(np.shape(v)) for v in given)
            raise ValueError(
                f"the operator {self.operator} with the output {self.outputs[0]!r}, on inputs of "
                f"shapes {shapes}: {error}"
            ) from error
        values.update(zip(self.outputs, found, strict=False))


class OnnxNetwork(eqx.Module):
    """A network read by [`read_onnx`][]: a callable, whose weights are arrays of this module.

    - `inputs`, `outputs`: names, with the declared number of axes of each input.

    Called with one array, or with a mapping from names where the network has several inputs. An
    array that has one axis less than declared is one case without the axis of a batch, which is
    added, and taken from the outputs.
    """

    weights: dict[str, Array]
    constants: tuple[tuple[str, tuple], ...] = eqx.field(static=True)
    nodes: tuple[Node, ...] = eqx.field(static=True)
    inputs: tuple[tuple[str, int, Any], ...] = eqx.field(static=True)
    outputs: tuple[str, ...] = eqx.field(static=True)
    version: int = eqx.field(static=True)

    def __call__(self, x: PyTree) -> PyTree:
        names = [name for name, _, _ in self.inputs]
        given = {names[0]: x} if len(names) == 1 and not isinstance(x, dict) else dict(x)
        if set(given) != set(names):
            raise ValueError(f"the network was given {sorted(given)}: its inputs are {names}.")
        values: dict[str, Any] = dict(self.weights)
        values.update((name, _array(*frozen)) for name, frozen in self.constants)
        single = False
        for name, rank, dtype in self.inputs:
            array = jnp.asarray(given[name], dtype)
            if array.ndim not in (rank, rank - 1):
                raise ValueError(
                    f"the input {name!r} has shape {array.shape}: the network declares {rank} axes."
                )
            single = single or array.ndim < rank
            values[name] = array[None] if array.ndim < rank else array
        for node in self.nodes:
            node.run(self.version, values)
        found = {name: jnp.asarray(values[name]) for name in self.outputs}
        if single:
            found = {name: _case(name, value) for name, value in found.items()}
        return found[self.outputs[0]] if len(found) == 1 else found


def read_onnx(path: str | os.PathLike[str], dtype: Any = None) -> OnnxNetwork:
    """Read a network from an ONNX file (needs the extra `onnx`).

    - `path`: the file. Weights in further files are read from its folder only.
    - `dtype`: compute in this type of floats instead of that of the weights, for instance
      `jnp.float64`.

    Dense and convolutional networks with the usual activations, norms and pools are supported, for
    inference. Raises ValueError, with the reason, for a file that is damaged or no network, an
    operator that is not supported, shapes that do not fit, and a file whose weights lie outside its
    folder. Nothing in a file is executed. (Shapes are looked at where the file declares those of
    its inputs, for a batch of one where it leaves that open; else when the network is called.)
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            'ONNX files need the package onnx: pip install "tolerax[onnx]".'
        ) from error
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        model = onnx.load(path, load_external_data=False)
        _check_external(onnx, model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        for value in model.graph.output:
            value.type.tensor_type.shape.SetInParent()  # often unknown, and of no use here
        onnx.checker.check_model(model)
        graph = model.graph
        tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    except Exception as error:
        raise ValueError(f"{path} is no ONNX file that can be read: {error}") from error
    if graph.sparse_initializer or model.functions:
        raise ValueError(f"{path}: sparse weights and functions of its own are not supported.")
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if version < OLDEST:
        raise ValueError(
            f"{path}: operator set {version} is too old: export with {OLDEST} or more."
        )
    unknown = sorted(
        {
            n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}"
            for n in graph.node
            if n.op_type not in OPERATORS or n.domain not in ("", "ai.onnx")
        }
    )
    if unknown:
        raise ValueError(
            f"{path}: the operators {', '.join(unknown)} are not supported: rewrite the network as "
            "a JAX callable, or export it for inference with simpler operators."
        )

    for node in graph.node:
        if node.op_type != "Constant":
            continue
        if len(node.attribute) != 1:
            raise ValueError(f"{path}: the Constant {node.output[0]!r} must have one value.")
        if node.attribute[0].name == "value":
            tensors[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    weights, constants = {}, []
    for name, array in tensors.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            weights[name] = jnp.asarray(array if dtype is None else array.astype(dtype))
        else:
            constants.append((name, _frozen(array)))
    inputs = tuple(
        _declared(onnx, value, dtype) for value in graph.input if value.name not in tensors
    )
    if not inputs or not graph.output:
        raise ValueError(f"{path}: the graph has no input or no output.")
    nodes = tuple(
        _node(onnx, numpy_helper, node) for node in graph.node if node.output[0] not in tensors
    )
    outputs = tuple(value.name for value in graph.output)
    network = OnnxNetwork(weights, tuple(constants), nodes, inputs, outputs, version)
    shapes = {v.name: _sizes(v) for v in graph.input if v.name not in tensors}
    if all(shape is not None for shape in shapes.values()):
        like = {name: jax.ShapeDtypeStruct(shapes[name], kind) for name, _, kind in inputs}
        try:
            eqx.filter_eval_shape(network, like)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return network


def _sizes(value: Any) -> tuple[int, ...] | None:
    """The declared shape of an input, with one case where the batch is open."""
    sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    if sizes and not sizes[0]:
        sizes[0] = 1
    return tuple(sizes) if all(size > 0 for size in sizes) else None


def _case(name: str, value: Array) -> Array:
    """The only case of a batch."""
    if value.ndim == 0 or value.shape[0] != 1:
        raise ValueError(
            f"the output {name!r} has shape {value.shape} for a batch of one: call the network "
            "with the axis of the batch."
        )
    return value.squeeze(0)


def _check_external(onnx: Any, model: Any, path: Path) -> None:
    """Weights in other files must lie in the folder of the model, as plain files."""
    folder = path.parent.resolve()
    tensors = list(model.graph.initializer)
    tensors += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        file = folder / place
        inside = file.resolve().is_relative_to(folder) and not file.is_symlink()
        if not place or os.path.isabs(place) or not inside or not file.is_file():
            raise ValueError(f"the weights {tensor.name!r} lie in {place!r}, not in its folder.")


def _declared(onnx: Any, value: Any, dtype: Any) -> tuple[str, int, Any]:
    """Name, number of axes and type of an input."""
    tensor = value.type.tensor_type
    own = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not np.issubdtype(own, np.floating):
        raise ValueError(f"the input {value.name!r} is {own}: only networks of floats are read.")
    own = own if dtype is None else np.dtype(dtype)
    return value.name, len(tensor.shape.dim), jax.dtypes.canonicalize_dtype(own).name


def _node(onnx: Any, numpy_helper: Any, node: Any) -> Node:
    attributes = []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = ("array", _frozen(numpy_helper.to_array(value)))
        elif isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, int | float):
            if not all(isinstance(v, int | float) for v in value):
                raise ValueError(f"{node.op_type}: the attribute {attribute.name!r} is a graph.")
            value = ("list", tuple(value))
        attributes.append((attribute.name, value))
    return Node(node.op_type, tuple(node.input), tuple(node.output), tuple(attributes))


def _frozen(array: np.ndarray) -> tuple:
    """An array as something that can be hashed."""
    return np.ascontiguousarray(array).tobytes(), array.dtype.str, array.shape


def _array(content: bytes, dtype: str, shape: tuple) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape)


def _thawed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, content = value
    return list(content) if kind == "list" else _array(*content)
