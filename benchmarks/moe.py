"""The figures of least squares in lanes and what stands on it: `python -m benchmarks moe`."""

from benchmarks import experts, lanes, linear_layer, sorption, vorticity

GROUPS = (
    lanes.SPEED_GROUP,
    lanes.NOISE_GROUP,
    lanes.GRADIENT_GROUP,
    lanes.SIZE_GROUP,
    linear_layer.GROUP,
    sorption.GROUP,
    sorption.INEXACT_GROUP,
    vorticity.GROUP,
    *experts.GROUPS,
)
