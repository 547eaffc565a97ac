"""The figures of derivative-free optimization: `python -m benchmarks dfo`."""

from benchmarks import dfo_constrained, dfo_profiles, dfo_robust, dfo_speed, dfo_workers

GROUPS = (
    dfo_profiles.GROUP,
    dfo_robust.GROUP,
    dfo_constrained.GROUP,
    dfo_speed.GROUP,
    dfo_workers.GROUP,
)
