"""What a GPU brings: particles of consensus-based optimization, Poisson control beside a CPU, and a
batch of points through a large network. Times are medians of warm calls."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import tolerax
from benchmarks.cbo_speed import Size, ours
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.pde_poisson import REDUCTION, run
from benchmarks.timing import seconds_per_call
from tolerax.problems.library import poisson_control

# The targets beside cbx, the last two numbers, are not looked at here.
PARTICLES, STEPS = Size(100, 1_000_000, 20, 20, 1, 1), 20
GRID, ALPHA = 1024, 1e-4
REPEATS = 5
WIDTH, DEPTH, POINTS = 2200, 3, 200


def gpu() -> Any:
    """The first GPU, or an error that says what there is."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise RuntimeError(f"no GPU: JAX computes on {jax.default_backend()}") from error


def particle_steps(device: Any, size: Size, steps: int) -> float:
    """Particle-steps a second, in float32."""
    with jax.default_device(device):
        call = ours(size, steps, jnp.float32)
        return size.particles * steps / seconds_per_call(call, REPEATS)


def poisson_seconds(device: Any, n: int) -> float:
    """Seconds of one run on P1, in float64."""
    with jax.default_device(device):
        p = poisson_control(n, ALPHA)
        once = functools.partial(run, p.problem, p.x0, jnp.asarray(REDUCTION))
        return seconds_per_call(once, REPEATS)


def poll_seconds(device: Any, width: int, points: int) -> tuple[float, float, int]:
    """Seconds of one point and of a batch through a dense network, in float32, and how many
    parameters it has."""
    with jax.default_device(device):
        network = eqx.nn.MLP(20, 10, width, DEPTH, key=jax.random.key(0), dtype=jnp.float32)
        bounds = (-jnp.ones(20, jnp.float32), jnp.ones(20, jnp.float32))
        problem = tolerax.NeuralSurrogate(network, lambda y, x: jnp.sum(y**2), bounds=bounds)
        ask = tolerax.Accuracy(1e-6, 1e-6)
        x = jax.random.uniform(jax.random.key(1), (points, 20), jnp.float32, -1, 1)
        mask = jnp.ones(points, bool)
        one = eqx.filter_jit(lambda problem, x: problem.evaluate(tolerax.Query(x, ask)).value)
        batch = eqx.filter_jit(
            lambda problem, x: problem.evaluate(tolerax.Query(x, ask, mask=mask)).value
        )
        parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)))
        first = x[0]
        single = seconds_per_call(lambda: one(problem, first), REPEATS)
        together = seconds_per_call(lambda: batch(problem, x), REPEATS)
        return single, together, parameters


def measure(settings: Settings) -> dict[str, Measured]:
    """All three on the first GPU."""
    device, cpu = gpu(), jax.devices("cpu")[0]
    detail = {"device": device.device_kind}
    rate = particle_steps(device, PARTICLES, STEPS)
    settings.tell(f"   {device.device_kind}: {rate:.3g} particle-steps a second")
    seconds = {"gpu": poisson_seconds(device, GRID), "cpu": poisson_seconds(cpu, GRID)}
    settings.tell(f"   Poisson control, {GRID} x {GRID}: {seconds}")
    single, together, parameters = poll_seconds(device, WIDTH, POINTS)
    settings.tell(f"   {parameters} parameters: one point {single} s, {POINTS} in {together} s")
    polls = detail | {"one": single, "batch": together, "parameters": parameters}
    return {
        "gpu_particle_steps": Measured([rate], detail=detail),
        "gpu_vs_cpu": Measured(
            [seconds["cpu"] / seconds["gpu"]], detail=detail | {"rows": seconds}
        ),
        "poll_batch": Measured([together / single], detail=polls),
    }


GROUPS = (
    Group(
        "gpu",
        (
            Bar("gpu_particle_steps", ">=", 5e8, "particle-steps a second, d 100, N 1e6, float32"),
            Bar(
                "gpu_vs_cpu", ">=", 20, "Poisson control at n = 1024: time on the CPU / on the GPU"
            ),
            Bar("poll_batch", "<=", 1.5, "200 points through 10M parameters / one point"),
        ),
        measure,
    ),
)
