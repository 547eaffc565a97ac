r"""
More experts, more devices
==========================

The same few functions serve better in small regions than in large ones: here
:math:`u' = -a u^2, u(0) = 1`, in the span of three functions, by 1 to 16 experts. Those
that are not tied to each other can be solved for on different devices; the answer is the same to
rounding.
"""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

x = jnp.linspace(0.0, 1.0, 96)
slope = jnp.asarray(np.gradient(np.eye(96), x[1], axis=0, edge_order=2))
equation = tolerax.Equation(
    channels=lambda u: jnp.stack([u, slope @ u]),
    residual=lambda z, a: (z[1] + a * z[0] ** 2) / a,
    data=lambda a: a,
    lift=lambda a: jnp.ones(96),
)


def basis(a):
    """Three functions that vanish at 0."""
    return jnp.stack([jnp.expm1(-rate * x) for rate in (2.0, 6.0, 18.0)])


a = jnp.linspace(10.0, 40.0, 8)
exact = 1 / (1 + a[:, None] * x[None])

# %%
# Errors with the number of experts, tied at their faces and each on its own. Beyond the first, an
# expert on its own has no value to begin with: only the shape of its functions holds it.

counts = (1, 2, 8) if small else (1, 2, 4, 8, 16)
errors: dict[str, list[float]] = {"tied": [], "alone": []}
jumps: dict[str, list[float]] = {"tied": [], "alone": []}
for count in counts:
    for name, faces in (("tied", 10.0), ("alone", None)):
        layer = tolerax.HardConstrained(
            basis, equation, tolerax.Boxes((96,), (count,)), faces=faces
        )
        field = eqx.filter_jit(layer)(a)
        errors[name].append(float(jnp.linalg.norm(field.u - exact) / jnp.linalg.norm(exact)))
        jumps[name].append(float(field.jump.mean()))
    print(
        f"{count:2d} experts: error {errors['tied'][-1]:.1e} tied, {errors['alone'][-1]:.1e} alone"
    )

# %%
# Devices. JAX can pretend that a host has several, by a flag that it reads when it starts: this
# runs in a process of its own. They share the same cores, hence nothing gets faster here; what the
# picture shows is how many of the 64 lanes (8 samples, 8 experts) each of them has, and that the
# field is the same to rounding.

program = """
import sys, jax, numpy as np, equinox as eqx, jax.numpy as jnp, tolerax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_enable_x64", True)
x = jnp.linspace(0.0, 1.0, 96)
slope = jnp.asarray(np.gradient(np.eye(96), x[1], axis=0, edge_order=2))
equation = tolerax.Equation(
    lambda u: jnp.stack([u, slope @ u]),
    lambda z, a: (z[1] + a * z[0] ** 2) / a,
    data=lambda a: a,
    lift=lambda a: jnp.ones(96),
)
basis = lambda a: jnp.stack([jnp.expm1(-rate * x) for rate in (2.0, 6.0, 18.0)])
first = None
for count in map(int, sys.argv[1:]):
    mesh = Mesh(np.array(jax.devices()[:count]), ("experts",))
    sharding = NamedSharding(mesh, PartitionSpec("experts"))
    solver = tolerax.BatchedLevenbergMarquardt(sharding=sharding)
    layer = tolerax.HardConstrained(
        basis, equation, tolerax.Boxes((96,), (8,)), solver=solver
    )
    u = np.asarray(eqx.filter_jit(layer)(jnp.linspace(10.0, 40.0, 8)).u)
    first = u if first is None else first
    print(count, 64 // count, np.abs(u - first).max())
"""
flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
numbers = ["1", "8"] if small else ["1", "2", "4", "8"]
command = [sys.executable, "-c", program, *numbers]
done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
devices, lanes, differences = np.array([line.split() for line in done.stdout.splitlines()], float).T
for row in zip(devices, lanes, differences, strict=True):
    print("{:.0f} devices, {:.0f} lanes on each: difference {:.0e}".format(*row))

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for name in errors:
    axes[0].loglog(counts, errors[name], "o-", label=name)
    axes[1].loglog(counts[1:], jumps[name][1:], "o-", label=name)
axes[0].set(xlabel="experts", ylabel="relative error", title="Error")
axes[1].set(xlabel="experts", ylabel="relative jump", title="Jumps at faces")
axes[0].legend()
axes[2].loglog(devices, lanes, "o-")
axes[2].set(
    xlabel="devices", ylabel="lanes on each", title=f"Fields differ by {max(differences):.0e}"
)
for ax, ticks in zip(axes, (counts, counts[1:], devices), strict=True):
    ax.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], minor=False)
    ax.minorticks_off()
plt.show()
