"""The figures of consensus-based optimization: `python -m benchmarks cbo`."""

from benchmarks import cbo_devices, cbo_hopping, cbo_memory, cbo_rotated, cbo_speed, cbo_success

GROUPS = (
    cbo_success.RASTRIGIN_GROUP,
    cbo_success.ACKLEY_GROUP,
    cbo_success.D100_GROUP,
    cbo_rotated.GROUP,
    cbo_success.SPHERE_GROUP,
    cbo_success.NAN_GROUP,
    cbo_hopping.GROUP,
    cbo_speed.SPEED_GROUP,
    cbo_speed.MANY_GROUP,
    cbo_devices.GROUP,
    cbo_memory.GROUP,
)
