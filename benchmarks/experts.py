"""What experts cost and keep: conservation, jumps at faces, time at many points, devices."""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems import Boxes, HardConstrained
from tolerax.problems.library import DiffusionSorption, SorptionBasis

BASIS, FACES = 16, 100.0


def layer(
    family: DiffusionSorption, parts: tuple[int, int], seed: int, basis: int = BASIS, **options: Any
) -> HardConstrained:
    """A layer that ends a network as it is before training."""
    network = SorptionBasis(family, basis, key=jax.random.key(seed + 10_000))
    grid = (len(family.x), len(family.t))
    return HardConstrained(network, family.equation, Boxes(grid, parts), **options)


solved = eqx.filter_jit(lambda layer, soils: layer(soils))


def measure_mass(settings: Settings) -> dict[str, Measured]:
    """The largest gap between what is stored after each of four spans of time and what came through
    both ends, relative to what is stored; with the rows held, and without them."""
    worst, rows = [], {}
    for seed in settings.seeds:
        family = DiffusionSorption(24, 25, spans=4)
        soils = family.sample(jax.random.key(seed), 4)
        held = layer(family, (2, 2), seed, faces=FACES)
        equation = eqx.tree_at(lambda e: e.balance, family.equation, None)
        free = HardConstrained(held.network, equation, held.router, faces=FACES)
        gaps = []
        for one in (held, free):
            field = solved(one, soils)
            gap = jnp.max(jnp.abs(jax.vmap(family.balance)(field.z, soils)))
            gaps.append(float(gap / jnp.mean(jax.vmap(family.storage)(field.u, soils))))
        worst.append(gaps[0])
        rows[f"seed {seed}"] = {"held": gaps[0], "free": gaps[1]}
        settings.tell(f"   seed {seed}: {rows[f'seed {seed}']}")
    return {"mass_balance": Measured(worst, value=max(worst), detail={"rows": rows})}


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each, measured in turns after a call that compiles."""
    seconds = dict.fromkeys(runs, np.inf)
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


@eqx.filter_jit
def training_step(layer: HardConstrained, soils: Any) -> Any:
    """The gradient of the loss in the network, and the field."""
    weights, static = eqx.partition(layer.network, eqx.is_inexact_array)

    def loss(weights: Any) -> Any:
        now = eqx.tree_at(lambda layer: layer.network, layer, eqx.combine(weights, static))
        field = now(soils, tolerance=1e-3)
        return jnp.mean(field.residual**2), field

    (_, field), slope = jax.value_and_grad(loss, has_aux=True)(weights)
    return slope, field.jump, field.lanes.evaluations


def measure_faces(settings: Settings) -> dict[str, Measured]:
    """Eight experts side by side: jumps, and the time of a training step, tied / each alone."""
    jumps, times, rows = [], [], {}
    for seed in settings.seeds:
        family = DiffusionSorption(48, 41)
        soils = family.sample(jax.random.key(seed), 4)
        layers = {
            "tied": layer(family, (8, 1), seed, faces=FACES),
            "alone": layer(family, (8, 1), seed),
        }
        found = {name: training_step(one, soils) for name, one in layers.items()}
        seconds = in_turns(
            {name: functools.partial(training_step, one, soils) for name, one in layers.items()},
            3 if settings.quick else 7,
        )
        jump = {name: float(jnp.mean(answer[1])) for name, answer in found.items()}
        jumps.append(jump["tied"] / jump["alone"])
        times.append(seconds["tied"] / seconds["alone"])
        rows[f"seed {seed}"] = {"jump": jump, "seconds": seconds}
        settings.tell(f"   seed {seed}: {rows[f'seed {seed}']}")
    return {
        "interface_jump": Measured(jumps, detail={"rows": rows}),
        "interface_time": Measured(times),
    }


def measure_time(settings: Settings) -> dict[str, Measured]:
    """A training step at 100,000 points: four experts of 16 functions and one of 64, which has as
    many coefficients; and one of 16 (in the details), which has as many functions."""
    ratios, rows = [], {}
    for seed in settings.seeds[:1]:
        family = DiffusionSorption(400, 250)
        soils = family.sample(jax.random.key(seed), 1)
        layers = {
            "experts": layer(family, (2, 2), seed),
            "single, 64": layer(family, (1, 1), seed, 64),
            "single, 16": layer(family, (1, 1), seed),
        }
        found = {name: training_step(one, soils) for name, one in layers.items()}
        seconds = in_turns(
            {name: functools.partial(training_step, one, soils) for name, one in layers.items()},
            2 if settings.quick else 4,
        )
        ratios.append(seconds["experts"] / seconds["single, 64"])
        evaluations = {name: answer[2].tolist() for name, answer in found.items()}
        rows[f"seed {seed}"] = {"seconds": seconds, "evaluations": evaluations}
        settings.tell(f"   seed {seed}: {rows[f'seed {seed}']}")
    return {"moe_time": Measured(ratios, detail={"rows": rows})}


DEVICES = """
import sys, jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from benchmarks.experts import layer, solved
from tolerax import BatchedLevenbergMarquardt
from tolerax.problems.library import DiffusionSorption

family = DiffusionSorption(24, 17)
soils = family.sample(jax.random.key(int(sys.argv[2])), 2)
rows = []
for count in (1, 8):
    mesh = Mesh(np.array(jax.devices()[:count]), ("experts",))
    sharding = None if count == 1 else NamedSharding(mesh, PartitionSpec("experts"))
    solver = BatchedLevenbergMarquardt(sharding=sharding)
    field = solved(layer(family, (3, 1), int(sys.argv[2]), solver=solver), soils)
    assert len(field.u.sharding.device_set) == count, field.u.sharding
    rows.append(field.u)
np.save(sys.argv[1], rows)
"""


def measure_devices(settings: Settings) -> dict[str, Measured]:
    """The largest difference of fields of 2 x 3 experts on one device and spread over eight (which
    the host pretends to have)."""
    worst = []
    for seed in settings.seeds:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "fields.npy")
            subprocess.run(
                [sys.executable, "-c", DEVICES, target, str(seed)],
                env=environment,
                cwd=Path(__file__).parents[1],
                check=True,
            )
            one, eight = np.load(target)
        worst.append(float(np.max(np.abs(one - eight))))
    settings.tell(f"   differences {worst}")
    return {"device_difference": Measured(worst, value=max(worst))}


GROUPS = (
    Group(
        "mass",
        (Bar("mass_balance", "<=", 1e-10, "gap of the mass balance with rows that hold it"),),
        measure_mass,
    ),
    Group(
        "faces",
        (
            Bar("interface_jump", "<=", 0.1, "jumps between 8 experts, tied / alone"),
            Bar("interface_time", "<=", 1.5, "time of a training step, tied / alone"),
        ),
        measure_faces,
    ),
    Group(
        "devices",
        (Bar("device_difference", "<=", 1e-12, "fields on 1 device and on 8"),),
        measure_devices,
    ),
    Group(
        "points",
        (Bar("moe_time", "<=", 0.5, "training step at 1e5 points, 4 experts / one, equal totals"),),
        measure_time,
    ),
)
