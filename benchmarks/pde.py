"""The figures of PDE-constrained optimization: `python -m benchmarks pde`.

Each group is a module of its own: the reduced space, where the state is a function of the control,
and the full space, where state, control and adjoint are unknowns of one system.
"""

from benchmarks import (
    pde_bounds,
    pde_evolution,
    pde_full_space,
    pde_inversion,
    pde_poisson,
    pde_semilinear,
    pde_sketch,
)

GROUPS = (
    pde_poisson.GROUP,
    pde_poisson.TIME_GROUP,
    pde_inversion.GROUP,
    pde_semilinear.GROUP,
    pde_full_space.GROUP,
    pde_sketch.GROUP,
    pde_evolution.GROUP,
    pde_bounds.GROUP,
)
