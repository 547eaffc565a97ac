"""The figures of least squares in lanes and what stands on it: `python -m benchmarks moe`."""

from benchmarks import lanes, linear_layer

GROUPS = (lanes.SPEED_GROUP, lanes.NOISE_GROUP, lanes.GRADIENT_GROUP, linear_layer.GROUP)
