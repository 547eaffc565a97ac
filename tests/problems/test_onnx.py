"""Networks from ONNX files against onnxruntime, and files that are refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tolerax
from tolerax.problems import read_onnx

RNG = np.random.default_rng(0)


def numbers(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def model(nodes, tensors, shape, opset=17, outputs=("y",)) -> Any:
    """A model with one input x of this shape and these nodes."""
    given: Any = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = [onnx.ValueInfoProto(name=y) for y in outputs]
    weights = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    graph = helper.make_graph(nodes, "network", [given], found, weights)
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=sets, ir_version=8)
    )


def written(tmp_path, *args, **options):
    path = tmp_path / "network.onnx"
    onnx.save(model(*args, **options), path)
    return path


def peer(path, x) -> Any:
    """What onnxruntime says."""
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


# Name, attributes, shape of x, further inputs, operator set.
ONE_OPERATOR: list[tuple] = [
    *((name, {}, (2, 3), [], 17) for name in ("Abs", "Exp", "Neg", "Sin", "Cos", "Tanh", "Erf")),
    *((name, {}, (2, 3), [], 17) for name in ("Log", "Sqrt")),
    ("Sum", {}, (2, 3), [numbers(3), numbers(2, 1)], 17),
    *((name, {}, (2, 3), [], 17) for name in ("Relu", "Sigmoid", "Softplus", "Softsign")),
    *((name, {}, (2, 3), [], 17) for name in ("HardSwish", "Reciprocal", "Selu", "HardSigmoid")),
    ("LeakyRelu", {"alpha": 0.3}, (2, 3), [], 17),
    ("Elu", {"alpha": 0.7}, (2, 3), [], 17),
    ("Celu", {"alpha": 0.7}, (2, 3), [], 17),
    ("Gelu", {}, (2, 3), [], 20),
    ("Gelu", {"approximate": "tanh"}, (2, 3), [], 20),
    ("PRelu", {}, (2, 3, 4), [numbers(3, 1)], 17),
    ("Clip", {"min": -0.5, "max": 0.5}, (2, 3), [], 7),
    ("Clip", {}, (2, 3), [np.float32(-0.5), np.float32(0.5)], 17),
    *((name, {}, (2, 3), [numbers(3)], 17) for name in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    ("Pow", {}, (2, 3), [np.float32(2)], 17),
    ("Gemm", {"alpha": 0.5, "beta": 2.0, "transB": 1}, (2, 3), [numbers(4, 3), numbers(4)], 17),
    ("Gemm", {"transA": 1}, (3, 2), [numbers(3, 4)], 17),
    ("MatMul", {}, (2, 5, 3), [numbers(3, 4)], 17),
    ("Conv", {"pads": [1, 0, 2, 1]}, (2, 3, 7, 6), [numbers(4, 3, 3, 2), numbers(4)], 17),
    ("Conv", {"strides": [2], "dilations": [2]}, (2, 4, 9), [numbers(6, 2, 3)], 17, {"group": 2}),
    (
        "Conv",
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        (1, 2, 5, 6),
        [numbers(3, 2, 3, 2)],
        17,
    ),
    ("Conv", {"auto_pad": "SAME_LOWER"}, (1, 2, 5, 6), [numbers(3, 2, 2, 2)], 17),
    ("ConvTranspose", {"strides": [2, 1]}, (2, 3, 4, 5), [numbers(3, 2, 3, 2), numbers(2)], 17),
    (
        "ConvTranspose",
        {"strides": [2], "pads": [1, 2], "output_padding": [1], "group": 2, "dilations": [2]},
        (2, 4, 5),
        [numbers(4, 3, 3)],
        17,
    ),
    (
        "MaxPool",
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        (2, 3, 7, 6),
        [],
        17,
    ),
    ("AveragePool", {"kernel_shape": [3], "pads": [1, 1]}, (2, 3, 7), [], 17),
    (
        "AveragePool",
        {"kernel_shape": [3], "pads": [1, 1], "count_include_pad": 1},
        (2, 3, 7),
        [],
        17,
    ),
    ("GlobalAveragePool", {}, (2, 3, 7, 6), [], 17),
    ("GlobalMaxPool", {}, (2, 3, 7, 6), [], 17),
    (
        "BatchNormalization",
        {"epsilon": 1e-2},
        (2, 3, 4),
        [numbers(3), numbers(3), numbers(3), np.abs(numbers(3))],
        17,
    ),
    ("LayerNormalization", {"axis": 1}, (2, 3, 4), [numbers(3, 4), numbers(3, 4)], 17),
    ("Softmax", {}, (2, 3, 4), [], 17),
    ("Softmax", {}, (2, 3, 4), [], 11),
    ("LogSoftmax", {"axis": 0}, (2, 3), [], 17),
    ("ReduceMean", {"axes": [1], "keepdims": 0}, (2, 3, 4), [], 17),
    ("ReduceSum", {}, (2, 3, 4), [np.array([0, 2])], 17),
    ("ReduceMax", {}, (2, 3), [], 17),
    ("ReduceMin", {"axes": [1]}, (2, 3), [], 17),
    ("ReduceProd", {"axes": [0], "keepdims": 0}, (2, 3), [], 17),
    ("Reshape", {}, (2, 3, 4), [np.array([0, -1])], 17),
    ("Flatten", {"axis": 2}, (2, 3, 4), [], 17),
    ("Transpose", {"perm": [1, 2, 0]}, (2, 3, 4), [], 17),
    ("Squeeze", {}, (2, 1, 3), [np.array([1])], 17),
    ("Squeeze", {"axes": [1]}, (2, 1, 3), [], 11),
    ("Unsqueeze", {}, (2, 3), [np.array([0, 3])], 17),
    ("Unsqueeze", {"axes": [1]}, (2, 3), [], 11),
    ("Concat", {"axis": 1}, (2, 3), [numbers(2, 2)], 17),
    (
        "Slice",
        {},
        (5, 6),
        [np.array([1, -1]), np.array([9, -7]), np.array([0, 1]), np.array([2, -2])],
        17,
    ),
    ("Slice", {"starts": [1], "ends": [3], "axes": [1]}, (2, 6), [], 9),
    ("Gather", {"axis": 1}, (2, 6), [np.array([[0, 5], [2, 2]])], 17),
    ("Expand", {}, (3, 1), [np.array([2, 1, 4])], 17),
    ("Pad", {}, (2, 3), [np.array([0, 1, 2, 0]), np.float32(0.5)], 17),
    ("Pad", {"mode": "reflect"}, (4, 3), [np.array([0, 1, 2, 0])], 17),
    ("Dropout", {}, (2, 3), [], 17),
    ("Identity", {}, (2, 3), [], 17),
]


@pytest.mark.parametrize("case", ONE_OPERATOR, ids=lambda case: f"{case[0]}-{case[4]}")
def test_operators_agree_with_onnxruntime(case, tmp_path):
    name, attributes, shape, further, opset, *more = case
    attributes = attributes | (more[0] if more else {})
    tensors = {f"t{i}": tensor for i, tensor in enumerate(further)}
    node = helper.make_node(name, ["x", *tensors], ["y"], **attributes)
    path = written(tmp_path, [node], tensors, shape, opset)
    x = numbers(*shape)
    (expected,) = peer(path, x)
    found = read_onnx(path)(x)
    assert found.dtype == jnp.float32
    # Single precision, sums of at most 30 terms of order 1.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def convolutional(tmp_path):
    """Convolution, norm, pool, a reshape to a size computed from the input, two outputs."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "b", "v"], ["n"]),
        helper.make_node("LeakyRelu", ["n"], ["r"], alpha=0.1),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Shape", ["p"], ["shape"]),
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["size"], axis=0),
        helper.make_node("Reshape", ["p", "size"], ["flat"]),
        helper.make_node(
            "Constant", [], ["dense"], value=numpy_helper.from_array(numbers(16, 6, scale=0.2))
        ),
        helper.make_node("MatMul", ["flat", "dense"], ["y"]),
        helper.make_node("Split", ["y"], ["left", "right"], axis=1),
    ]
    tensors = {
        "w": numbers(4, 1, 3, 3),
        "b": numbers(4),
        "s": numbers(4),
        "v": np.abs(numbers(4)) + 0.1,
        "axis": np.array([0]),
        "rest": np.array([-1]),
    }
    return written(
        tmp_path, nodes, tensors, ["batch", 1, 8, 8], opset=13, outputs=("left", "right")
    )


def test_a_convolutional_network_agrees_with_onnxruntime(tmp_path):
    path = convolutional(tmp_path)
    network = read_onnx(path)
    x = numbers(5, 1, 8, 8)
    expected = peer(path, x)
    found = eqx.filter_jit(network)(x)
    for name, values in zip(("left", "right"), expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
    # One case without the axis of the batch.
    one = network(x[2])
    np.testing.assert_allclose(one["right"], expected[1][2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"has shape \(8, 8\): the network declares 4 axes"):
        network(x[0, 0])


def test_integers_casts_and_constants_agree_with_onnxruntime(tmp_path):
    """Division towards 0, constants in single precision, weights in half a float."""
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Div", ["a", "b"], ["quotient"]),
        helper.make_node("Add", ["whole", "quotient"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Mul", ["float", "half"], ["scaled"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Add", ["scaled", "zeros"], ["moved"]),
        helper.make_node("Cast", ["bits"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["moved", "wide"], ["y"]),
    ]
    tensors = {
        "a": np.array([-7, 7, -6], np.int32),
        "b": np.array([2, -2, 3], np.int32),
        "size": np.array([3]),
    }
    made = model(nodes, tensors, (2, 3))
    made.graph.initializer.append(
        helper.make_tensor("bits", TensorProto.BFLOAT16, [3], [1.0, 2.0, -3.0])
    )
    path = tmp_path / "network.onnx"
    path.write_bytes(made.SerializeToString())
    x = 3 * numbers(2, 3)
    found = read_onnx(path)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, peer(path, x)[0])


def test_in_double_precision_derivatives_are_exact(tmp_path):
    network = read_onnx(convolutional(tmp_path), jnp.float64)
    x = jnp.asarray(numbers(1, 8, 8), jnp.float64)
    value = lambda x: jnp.sum(network(x)["left"] ** 2)  # noqa: E731
    v = jnp.asarray(numbers(1, 8, 8), jnp.float64)
    slope = jax.jvp(value, (x,), (v,))[1]
    step = 1e-6
    difference = (value(x + step * v) - value(x - step * v)) / (2 * step)
    # The error of the difference: rounding of order 1e-10, and no kinks in between.
    assert slope == pytest.approx(float(difference), rel=1e-6)


def test_a_surrogate_from_a_file(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("ReduceSum", ["t", "axis"], ["y"], keepdims=0),
    ]
    tensors = {"w": np.eye(2, dtype=np.float32), "axis": np.array([1])}
    path = written(tmp_path, nodes, tensors, [1, 2])
    problem = tolerax.NeuralSurrogate(path, lambda z, x: jnp.sum(z), maximize=True, trust=(-1, 2.0))
    solution = tolerax.solve(problem, tolerax.InexactLineSearch(atol=1e-4), jnp.zeros(2))
    np.testing.assert_array_equal(solution.x, [2.0, 2.0])
    assert 0 < float(solution.value_error) < 1e-6


# -- files that are refused -----------------------------------------------------------------------


def relu(tmp_path):
    return written(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {}, (2, 3))


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = relu(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no ONNX file that can be read"):
        read_onnx(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "noise.onnx"
    for seed in range(20):
        path.write_bytes(np.random.default_rng(seed).bytes(500))
        with pytest.raises(ValueError, match="is no ONNX file that can be read"):
            read_onnx(path)
    with pytest.raises(ValueError, match="there is no such file"):
        read_onnx(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link", ""])
def test_weights_outside_the_folder_are_refused(place, tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.write_bytes(bytes(16))
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    made = model(nodes, {"w": np.zeros(4, np.float32)}, (4,))
    (weights,) = made.graph.initializer
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", place
    path = folder / "network.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match=r"'w' lie in .*, not in its folder"):
        read_onnx(path)


def test_weights_in_the_folder_are_read(tmp_path):
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    path = tmp_path / "network.onnx"
    made = model(nodes, {"w": np.arange(400, dtype=np.float32)}, (400,))
    onnx.save(made, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "weights").is_file()
    np.testing.assert_array_equal(read_onnx(path)(np.ones(400)), 1 + np.arange(400))


@pytest.mark.parametrize(
    ("nodes", "options", "match"),
    [
        ([helper.make_node("ArgMax", ["x"], ["y"])], {}, "the operators ArgMax are not supported"),
        ([helper.make_node("Relu", ["x"], ["y"])], {"opset": 6}, "operator set 6 is too old"),
        ([helper.make_node("Relu", ["nothing"], ["y"])], {}, "is no ONNX file that can be read"),
    ],
)
def test_what_is_not_supported_is_named(nodes, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read_onnx(written(tmp_path, nodes, {}, (2, 3), **options))


POOL = {"kernel_shape": [2], "ceil_mode": 1}


@pytest.mark.parametrize(
    ("node", "tensors", "match"),
    [
        (("Add", "c"), {}, "the Constant 'c' must have one value"),
        (("MatMul", "w"), {"w": np.ones((4, 5), np.float32)}, r"MatMul .*'y'.*\(2, 3\), \(4, 5\)"),
        (("Reshape", "w"), {"w": np.array([5, -1])}, "the operator Reshape"),
        (("Transpose", {"perm": [0, 0]}), {}, "the operator Transpose"),
        (("MaxPool", POOL), {}, "ceil_mode are not supported"),
        (("Gather", "w"), {"w": np.array([7])}, "the index 7 is out of range for an axis"),
        (("ConstantOfShape", "w"), {"w": np.array([1 << 40])}, "a constant of shape"),
        (("Expand", "w"), {"w": np.array([1 << 40, 2, 3])}, "a value of more than"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_nodes_that_cannot_run_are_named_when_read(node, tensors, match, tmp_path):
    name, *rest = node
    attributes = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    given = rest if name == "ConstantOfShape" else ["x", *rest]
    nodes = [helper.make_node(name, given, ["y"], **attributes)]
    if name == "Add":
        nodes.insert(0, helper.make_node("Constant", [], ["c"]))
    weights = [numpy_helper.from_array(t, key) for key, t in tensors.items()]
    shape = (2, 3, 3) if name == "MaxPool" else (2, 3)
    value: Any = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found: Any = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [found], weights)
    sets = [helper.make_opsetid("", 17)]
    path = tmp_path / "network.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString())
    with pytest.raises(ValueError, match=match):
        read_onnx(path)


def test_an_operator_of_another_domain_is_named(tmp_path):
    path = relu(tmp_path)
    made = onnx.load(path)
    made.graph.node[0].domain = "mine"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match=r"the operators mine\.Relu are not supported"):
        read_onnx(path)


def test_an_output_without_the_axis_of_the_batch_is_named(tmp_path):
    path = written(tmp_path, [helper.make_node("ReduceSum", ["x"], ["y"])], {}, (1, 3))
    assert read_onnx(path)(np.ones((1, 3))).shape == (1, 1)
    path = written(tmp_path, [helper.make_node("Transpose", ["x"], ["y"])], {}, (1, 3))
    with pytest.raises(ValueError, match=r"the output 'y' has shape \(3, 1\)"):
        read_onnx(path)(np.ones(3))


def test_a_network_in_training_mode_is_named(tmp_path):
    tensors = {"r": np.float32(0.5), "t": np.array(True)}
    nodes = [helper.make_node("Dropout", ["x", "r", "t"], ["y"])]
    with pytest.raises(ValueError, match="Dropout is in training mode"):
        read_onnx(written(tmp_path, nodes, tensors, (2, 3)))(np.ones((2, 3)))
