"""The memory that many particles take, measured by the system in a process of its own."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import tolerax
from benchmarks.cbo_functions import Moved, rastrigin
from benchmarks.frame import Bar, Group, Measured, Settings

PARTICLES, D, STEPS = 10**6, 100, 3


def largest(particles: int) -> float:
    """The most memory of this process in GB, after a few steps in float32."""
    problem = tolerax.Objective(Moved(rastrigin, jnp.ones(D, jnp.float32)))
    solver = tolerax.CBO(particles=particles)
    solution = tolerax.solve(problem, solver, jnp.zeros(D, jnp.float32), max_steps=STEPS)
    jax.block_until_ready(solution)
    unit = 1 if sys.platform == "darwin" else 1024  # of what the system says
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(settings: Settings) -> dict[str, Measured]:
    """With a million particles, also in a quick run: with few it would be that of the compiler."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.cbo_memory"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    figure = float(found.stdout.split()[-1])
    settings.tell(f"   {PARTICLES:,} particles, d {D}: {figure:.2f} GB")
    return {"memory_gb": Measured([figure], detail={"particles_gb": 4e-9 * PARTICLES * D})}


GROUP = Group(
    "memory",
    (Bar("memory_gb", "<=", 2, "largest memory of a process, N = 1e6, d = 100 in float32"),),
    measure,
)

if __name__ == "__main__":
    print(largest(PARTICLES))
