"""The same run on 1, 2, 4 and 8 devices, compared bit by bit.

The devices are forced on the host, which must be said before JAX starts: so the runs take place in
a process of their own, `python -m benchmarks.cbo_devices FILE`.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Bar, Group, Measured, Settings

COUNTS = (1, 2, 4, 8)
D, STEPS = 20, 50
PARTICLES = (64, 512)  # one row in each block of the sums, and eight
KINDS = ("SoftConsensus", "HardMinimum")
NOISES = {"RankWeights": "Covariance"}  # of a consensus; of the others "Anisotropic"


def last_particles(count: int, kind: str, particles: int, steps: int = STEPS) -> np.ndarray:
    """The particles after a run on the first `count` devices, 0 for a run without sharding."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import tolerax
    import tolerax.solvers
    from benchmarks.cbo_functions import Moved, rastrigin
    from benchmarks.cbo_runs import start

    sharding = None
    if count:
        mesh = Mesh(np.array(jax.devices()[:count]), ("particles",))
        sharding = NamedSharding(mesh, PartitionSpec("particles"))
    key = jax.random.key(0)
    solver = tolerax.CBO(
        particles=particles,
        consensus=getattr(tolerax.solvers, kind)(),
        noise=getattr(tolerax.solvers, NOISES.get(kind, "Anisotropic"))(),
        ensemble=start(key, particles, D),
        sharding=sharding,
    )
    problem = tolerax.Objective(Moved(rastrigin, jnp.ones(D)))
    solution = tolerax.solve(problem, solver, jnp.zeros(D), key=key, max_steps=steps)
    x = solution.state.solver_state.x
    if count > 1 and len(x.sharding.device_set) != count:
        raise RuntimeError(
            f"the particles lie on {len(x.sharding.device_set)} devices, not {count}"
        )
    return np.asarray(x)


def names(
    particles: Sequence[int], counts: Sequence[int] = (0, *COUNTS), kinds: Sequence[str] = KINDS
) -> list[str]:
    """The runs with these numbers of devices, consensus and numbers of particles."""
    return [" ".join(map(str, run)) for run in itertools.product(counts, kinds, particles)]


def write(path: str, steps: str, *runs: str) -> None:
    """The particles of these runs, to a file of arrays."""
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays: dict[str, Any] = {}
    for run in runs:
        count, kind, many = run.split(" ")
        arrays[run] = last_particles(int(count), kind, int(many), int(steps))
    np.savez(path, **arrays)


def all_runs(runs: Sequence[str], steps: int = STEPS) -> dict[str, np.ndarray]:
    """The particles of these runs, from a process with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={COUNTS[-1]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.npz"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cbo_devices", str(path), str(steps), *runs],
            env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        with np.load(path) as arrays:
            return dict(arrays)


def same_runs(runs: dict[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """The runs that must agree with each other, by the number of devices."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, x in runs.items():
        count, what = name.split(" ", 1)
        found.setdefault(what, {})[int(count)] = x
    return found


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.max(np.abs(x - y)) / np.max(np.abs(y)))


def compare(runs: dict[str, np.ndarray]) -> dict[str, Measured]:
    """How many runs on 4 and 8 devices differ from those on 2, and how far those on 1 are away."""
    differ, away, detail = 0, [], {}
    for name, by in same_runs(runs).items():
        same = {n: bool(np.array_equal(by[n], by[2])) for n in COUNTS[2:]}
        differ += sum(not equal for equal in same.values())
        away.append(max(relative(by[1], by[n]) for n in COUNTS[1:]))
        detail[name] = {
            "bit_equal_to_2_devices": {str(n): equal for n, equal in same.items()},
            "one_device_differs_by": away[-1],
            "no_sharding_differs_by": relative(by[0], by[2]),
        }
    return {
        "device_bits_differ": Measured([differ], detail=detail),
        "device_difference": Measured(away, value=max(away)),
    }


def measure(settings: Settings) -> dict[str, Measured]:
    return compare(all_runs(names(PARTICLES[:1] if settings.quick else PARTICLES)))


GROUP = Group(
    "devices",
    (
        Bar("device_bits_differ", "<=", 0, "runs on 2, 4, 8 devices that are not bit-equal"),
        Bar("device_difference", "<=", 1e-10, "relative difference of 1 device from them, float64"),
    ),
    measure,
)

if __name__ == "__main__":
    write(*sys.argv[1:])
