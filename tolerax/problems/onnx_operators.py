"""The operators of ONNX that networks for prediction are made of, in JAX.

An operator is a function of its attributes, the version of the operator set, and its inputs (an
input that is left out is `None`). Values that are known without the input of the network, such as
shapes, are NumPy arrays and stay that: operators on them are computed while tracing.

Source: the operator definitions of ONNX (operator sets 7 and later).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Attributes = dict[str, Any]
LARGEST = 2**28  # entries of a constant that is made while tracing

#: By name: `(attributes, version, *inputs) -> output`.
OPERATORS: dict[str, Callable] = {}


def operator(*names: str) -> Callable:
    """Register a function as these operators."""

    def register(function: Callable) -> Callable:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def _known(*values: Any) -> bool:
    return all(v is None or isinstance(v, np.ndarray | np.generic) for v in values)


def _xp(*values: Any) -> Any:
    return np if _known(*values) else jnp


def _static(value: Any, what: str) -> np.ndarray:
    if not _known(value):
        raise ValueError(f"{what} depends on the input of the network, which is not supported.")
    return np.asarray(value)


# -- elementwise ----------------------------------------------------------------------------------

for _name, _function in {
    "Abs": "abs",
    "Cos": "cos",
    "Exp": "exp",
    "Log": "log",
    "Neg": "negative",
    "Sin": "sin",
    "Sqrt": "sqrt",
    "Tanh": "tanh",
}.items():
    OPERATORS[_name] = lambda a, v, x, f=_function: getattr(_xp(x), f)(x)

for _name, _function in {
    "Erf": jax.scipy.special.erf,
    "Relu": jax.nn.relu,
    "Sigmoid": jax.nn.sigmoid,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "HardSwish": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "Reciprocal": lambda x: 1 / x,
    "GlobalAveragePool": lambda x: jnp.mean(x, tuple(range(2, x.ndim)), keepdims=True),
    "GlobalMaxPool": lambda x: jnp.max(x, tuple(range(2, x.ndim)), keepdims=True),
}.items():
    OPERATORS[_name] = lambda a, v, x, f=_function: f(x)


def _folded(attributes: Attributes, version: int, *inputs: Any, f: str) -> Any:
    xp = _xp(*inputs)
    inputs = xp.broadcast_arrays(*inputs)
    return functools.reduce(getattr(xp, f), inputs)


for _name, _function in {
    "Add": "add",
    "Sub": "subtract",
    "Mul": "multiply",
    "Pow": "power",
    "Min": "minimum",
    "Max": "maximum",
    "Sum": "add",
}.items():
    OPERATORS[_name] = functools.partial(_folded, f=_function)


@operator("Div")
def div(a: Attributes, v: int, x: Any, y: Any) -> Any:
    """Integers are divided as in C."""
    xp = _xp(x, y)
    x, y = xp.broadcast_arrays(x, y)
    if xp.issubdtype(x.dtype, np.floating):
        return x / y
    whole = x // y  # rounded down; in C towards 0
    return (whole + ((whole < 0) & (whole * y != x))).astype(x.dtype)


@operator("LeakyRelu")
def leaky_relu(a: Attributes, v: int, x: Any) -> Any:
    """`alpha x` below 0."""
    return jnp.where(x < 0, a.get("alpha", 0.01) * x, x)


@operator("PRelu")
def prelu(a: Attributes, v: int, x: Any, slope: Any) -> Any:
    """`slope x` below 0."""
    return jnp.where(x < 0, jnp.broadcast_to(slope, x.shape) * x, x)


@operator("Elu")
def elu(a: Attributes, v: int, x: Any) -> Any:
    """`alpha (exp(x) - 1)` below 0."""
    return jax.nn.elu(x, a.get("alpha", 1.0))


OPERATORS["Celu"] = lambda a, v, x: jax.nn.celu(x, a.get("alpha", 1.0))


@operator("Selu")
def selu(a: Attributes, v: int, x: Any) -> Any:
    """Scaled `elu`."""
    alpha, gamma = (
        a.get("alpha", 1.67326319217681884765625),
        a.get("gamma", 1.05070102214813232421875),
    )
    return gamma * jax.nn.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(a: Attributes, v: int, x: Any) -> Any:
    """A line, cut off."""
    return jnp.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1)


@operator("Gelu")
def gelu(a: Attributes, v: int, x: Any) -> Any:
    """With the error function, or by tanh."""
    return jax.nn.gelu(x, approximate=a.get("approximate", "none") == "tanh")


@operator("Clip")
def clip(a: Attributes, v: int, x: Any, low: Any = None, high: Any = None) -> Any:
    """Between two bounds: attributes before version 11, then inputs."""
    low = a.get("min", low) if low is None else low
    high = a.get("max", high) if high is None else high
    return _xp(x, low, high).clip(x, low, high)


@operator("Identity")
def identity(a: Attributes, v: int, x: Any) -> Any:
    """Nothing."""
    return x


@operator("Dropout")
def dropout(a: Attributes, v: int, x: Any, ratio: Any = None, training: Any = None) -> Any:
    """Nothing, in a network that predicts."""
    if training is not None and bool(_static(training, "training_mode of Dropout")):
        raise ValueError("Dropout is in training mode: export the network for inference.")
    return x


@operator("Cast")
def cast(a: Attributes, v: int, x: Any) -> Any:
    """To another type; one that JAX has not enabled becomes the nearest that it has."""
    from onnx.helper import tensor_dtype_to_np_dtype  # pyright: ignore[reportMissingImports]

    dtype = tensor_dtype_to_np_dtype(a["to"])
    return x.astype(dtype if _known(x) else jax.dtypes.canonicalize_dtype(dtype))


# -- products -------------------------------------------------------------------------------------


@operator("Gemm")
def gemm(a: Attributes, v: int, x: Any, y: Any, c: Any = None) -> Any:
    """`alpha x y + beta c`, with either transposed."""
    x = x.T if a.get("transA", 0) else x
    y = y.T if a.get("transB", 0) else y
    out = a.get("alpha", 1.0) * (x @ y)
    return out if c is None else out + a.get("beta", 1.0) * jnp.broadcast_to(c, out.shape)


@operator("MatMul")
def matmul(a: Attributes, v: int, x: Any, y: Any) -> Any:
    """As in NumPy."""
    return jnp.matmul(x, y)


def _padding(
    a: Attributes, spatial: int, size: Any, kernel: Any, stride: Any, dilation: Any
) -> list[tuple[int, int]]:
    """Pairs of paddings for the spatial axes."""
    auto = a.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * spatial
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            few, many = total // 2, total - total // 2
            pairs.append((few, many) if auto == "SAME_UPPER" else (many, few))
        return pairs
    pads = a.get("pads", [0] * 2 * spatial)
    return list(zip(pads[:spatial], pads[spatial:], strict=True))


@operator("Conv")
def conv(a: Attributes, v: int, x: Any, w: Any, b: Any = None) -> Any:
    """Convolution over any number of axes, in groups."""
    n = x.ndim - 2
    stride, dilation = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    padding = _padding(a, n, x.shape[2:], w.shape[2:], stride, dilation)
    out = jax.lax.conv_general_dilated(
        x, w, stride, padding, rhs_dilation=dilation, feature_group_count=a.get("group", 1)
    )
    return out if b is None else out + b.reshape((1, -1) + (1,) * n)


@operator("ConvTranspose")
def conv_transpose(a: Attributes, v: int, x: Any, w: Any, b: Any = None) -> Any:
    """The transpose of a convolution; `w` has shape (in, out / groups, ...)."""
    n, group = x.ndim - 2, a.get("group", 1)
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in a:
        raise ValueError("ConvTranspose with auto_pad or output_shape: export it with pads.")
    stride, dilation = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    extra = a.get("output_padding", [0] * n)
    pads = _padding(a, n, x.shape[2:], w.shape[2:], stride, dilation)
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilation, strict=True)]
    padding = [(r - p, r - q + e) for r, (p, q), e in zip(reach, pads, extra, strict=True)]
    # Within each group input and output channels change places, and the kernel is turned round.
    w = w.reshape((group, w.shape[0] // group, *w.shape[1:])).swapaxes(1, 2)
    w = jnp.flip(w.reshape((-1, *w.shape[2:])), range(2, 2 + n))
    out = jax.lax.conv_general_dilated(
        x,
        w,
        [1] * n,
        padding,
        lhs_dilation=stride,
        rhs_dilation=dilation,
        feature_group_count=group,
    )
    return out if b is None else out + b.reshape((1, -1) + (1,) * n)


# -- pools and norms ------------------------------------------------------------------------------


def _pool(a: Attributes, x: Any, init: Any, reduce: Any) -> tuple[Any, Any]:
    """Windows of x reduced, and of ones summed (without the padding)."""
    n = x.ndim - 2
    kernel = a["kernel_shape"]
    stride, dilation = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    if a.get("ceil_mode", 0):
        raise ValueError("pools with ceil_mode are not supported: export with ceil_mode=0.")
    padding = [(0, 0), (0, 0), *_padding(a, n, x.shape[2:], kernel, stride, dilation)]
    window = functools.partial(
        jax.lax.reduce_window,
        window_dimensions=(1, 1, *kernel),
        window_strides=(1, 1, *stride),
        padding=padding,
        window_dilation=(1, 1, *dilation),
    )
    ones = window(jnp.ones((1, 1, *x.shape[2:]), x.dtype), 0.0, jax.lax.add)
    return window(x, init, reduce), jnp.broadcast_to(ones, (*x.shape[:2], *ones.shape[2:]))


@operator("MaxPool")
def max_pool(a: Attributes, v: int, x: Any) -> Any:
    """The largest of each window."""
    return _pool(a, x, -jnp.inf, jax.lax.max)[0]


@operator("AveragePool")
def average_pool(a: Attributes, v: int, x: Any) -> Any:
    """The mean of each window, with or without the padding."""
    total, count = _pool(a, x, 0.0, jax.lax.add)
    return total / (np.prod(a["kernel_shape"]) if a.get("count_include_pad", 0) else count)


@operator("BatchNormalization")
def batch_norm(a: Attributes, v: int, x: Any, scale: Any, b: Any, mean: Any, var: Any) -> Any:
    """With the statistics of the training."""
    if a.get("training_mode", 0):
        raise ValueError("BatchNormalization is in training mode: export it for inference.")
    factor = scale / jnp.sqrt(var + a.get("epsilon", 1e-5))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * factor.reshape(shape) + (b - mean * factor).reshape(shape)


@operator("LayerNormalization")
def layer_norm(a: Attributes, v: int, x: Any, scale: Any, b: Any = None) -> Any:
    """Mean 0 and variance 1 over the last axes."""
    axes = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
    centred = x - jnp.mean(x, axes, keepdims=True)
    var = jnp.mean(jnp.square(centred), axes, keepdims=True)
    out = centred / jnp.sqrt(var + a.get("epsilon", 1e-5)) * jnp.broadcast_to(scale, x.shape)
    return out if b is None else out + jnp.broadcast_to(b, x.shape)


@operator("Softmax")
def softmax(a: Attributes, v: int, x: Any, *, f: Callable = jax.nn.softmax) -> Any:
    """Along one axis; before version 13 along all axes from that one on."""
    if v >= 13:
        return f(x, a.get("axis", -1))
    axis = a.get("axis", 1) % x.ndim
    return f(x.reshape((*x.shape[:axis], -1)), -1).reshape(x.shape)


OPERATORS["LogSoftmax"] = functools.partial(softmax, f=jax.nn.log_softmax)


def _reduced(a: Attributes, v: int, x: Any, axes: Any = None, *, f: str) -> Any:
    axes = a.get("axes") if axes is None else _static(axes, "axes").tolist()
    if not axes and a.get("noop_with_empty_axes", 0):
        return x
    over = tuple(axes) if axes else None
    return getattr(_xp(x), f)(x, axis=over, keepdims=bool(a.get("keepdims", 1)))


for _name, _function in {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
}.items():
    OPERATORS[_name] = functools.partial(_reduced, f=_function)


# -- shapes ---------------------------------------------------------------------------------------


@operator("Shape")
def shape(a: Attributes, v: int, x: Any) -> np.ndarray:
    """Known while tracing."""
    return np.asarray(x.shape[slice(a.get("start", 0), a.get("end"))], np.int64)


@operator("Constant")
def constant(a: Attributes, v: int) -> Any:
    """The value in whichever attribute it is: numbers are single precision, or integers."""
    kinds = {"value_float": np.float32, "value_floats": np.float32}
    kinds |= {"value_int": np.int64, "value_ints": np.int64}
    for name, kind in kinds.items():
        if name in a:
            return np.asarray(a[name], kind)
    raise ValueError("only constants that are tensors or numbers are supported.")


@operator("ConstantOfShape")
def constant_of_shape(a: Attributes, v: int, size: Any) -> Any:
    """One value everywhere."""
    value = np.asarray(a.get("value", np.zeros(1, np.float32))).ravel()[0]
    shape = _static(size, "a shape").tolist()
    if math.prod(shape) > LARGEST:
        raise ValueError(f"a constant of shape {shape} has more than {LARGEST} entries.")
    return np.full(shape, value)


@operator("Reshape")
def reshape(a: Attributes, v: int, x: Any, size: Any) -> Any:
    """0 keeps an axis, -1 takes what is left."""
    sizes = _static(size, "a shape").tolist()
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(a: Attributes, v: int, x: Any) -> Any:
    """Two axes."""
    axis = a.get("axis", 1)
    return x.reshape((int(np.prod(x.shape[:axis])), -1))


@operator("Transpose")
def transpose(a: Attributes, v: int, x: Any) -> Any:
    """Axes in another order."""
    return x.transpose(a.get("perm"))


@operator("Squeeze")
def squeeze(a: Attributes, v: int, x: Any, axes: Any = None) -> Any:
    """Axes of length 1 go."""
    axes = a.get("axes") if axes is None else _static(axes, "axes").tolist()
    return x.squeeze(None if axes is None else tuple(axes))


@operator("Unsqueeze")
def unsqueeze(a: Attributes, v: int, x: Any, axes: Any = None) -> Any:
    """Axes of length 1 come."""
    axes = a["axes"] if axes is None else _static(axes, "axes").ravel().tolist()
    return _xp(x).expand_dims(x, tuple(axes))


@operator("Concat")
def concat(a: Attributes, v: int, *parts: Any) -> Any:
    """One after the other."""
    return _xp(*parts).concatenate([_xp(*parts).asarray(part) for part in parts], a["axis"])


@operator("Split")
def split(a: Attributes, v: int, x: Any, sizes: Any = None) -> Any:
    """Several outputs; without sizes as many as there are."""
    sizes = a.get("split") if sizes is None else _static(sizes, "split").tolist()
    axis = a.get("axis", 0)
    if sizes is None:
        count = a.get("num_outputs", a["outputs"])
        whole = -(-x.shape[axis] // count)
        sizes = [whole] * (count - 1) + [x.shape[axis] - whole * (count - 1)]
    return tuple(_xp(x).split(x, np.cumsum(sizes)[:-1].tolist(), axis))


@operator("Slice")
def slice_(a: Attributes, v: int, x: Any, *where: Any) -> Any:
    """Attributes before version 10, then inputs: starts, ends, axes, steps."""
    if where:
        starts, ends, axes, steps = [
            None if w is None else _static(w, "a slice").ravel().tolist()
            for w in (*where, None, None)[:4]
        ]
    else:
        starts, ends, axes, steps = a["starts"], a["ends"], a.get("axes"), None
    index: list[Any] = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts or [], ends or [], strict=True)):
        step = 1 if steps is None else steps[i]
        # Beyond the beginning means all, which Python writes as None.
        end = None if step < 0 and end < -x.shape[i if axes is None else axes[i]] else end
        index[i if axes is None else axes[i]] = slice(start, end, step)
    return x[tuple(index)]


@operator("Gather")
def gather(a: Attributes, v: int, x: Any, index: Any) -> Any:
    """Entries along one axis."""
    if _known(index):
        size = x.shape[a.get("axis", 0)]
        out = np.asarray(index)[(np.asarray(index) < -size) | (np.asarray(index) >= size)]
        if out.size:
            raise ValueError(f"the index {out[0]} is out of range for an axis of length {size}.")
    return _xp(x, index).take(x, index, axis=a.get("axis", 0))


@operator("Expand")
def expand(a: Attributes, v: int, x: Any, size: Any) -> Any:
    """Broadcast both ways."""
    shape = np.broadcast_shapes(x.shape, tuple(_static(size, "a shape").tolist()))
    return _xp(x).broadcast_to(x, shape)


@operator("Pad")
def pad(
    a: Attributes, v: int, x: Any, pads: Any = None, value: Any = None, axes: Any = None
) -> Any:
    """Attributes before version 11, then inputs."""
    pads = a["pads"] if pads is None else _static(pads, "pads").tolist()
    value = a.get("value", 0.0) if value is None else value
    over = range(x.ndim) if axes is None else _static(axes, "axes").tolist()
    width = [(0, 0)] * x.ndim
    for i, axis in enumerate(over):
        width[axis] = (pads[i], pads[i + len(pads) // 2])
    mode = a.get("mode", "constant")
    if mode == "constant":
        return jnp.pad(x, width, constant_values=jnp.asarray(value, x.dtype).reshape(()))
    return jnp.pad(x, width, mode)
