"""
A black box that fails
======================

A cost that jumps and has no value in a corner, as a simulator would that does not converge there.
``CDSM`` needs neither derivatives nor continuity: points that fail are
infeasible to it. The points of a poll are evaluated by Dask where it is installed (``pip install
tolerax[dask]``), by threads of this process otherwise.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax

jax.config.update("jax_enable_x64", True)


def cost(x):
    if x[0] + 0.5 * x[1] > 2.0:
        raise ArithmeticError("no convergence")
    return float(np.ceil(3 * (x[0] - 1.5) ** 2) / 2 + (x[1] - 1.2) ** 2 + 0.5 * (x[0] - 2) ** 2)


# %%
# Ask for it as Python code, and let exceptions count as failures. Anything with ``submit``
# evaluates points: here a Dask cluster of two workers within this process, which starts anywhere.
# A script of its own uses processes, the default of Dask's ``LocalCluster``, or a cluster that is
# there. The run is the same to the last bit whoever evaluates.

problem = tolerax.Objective(
    cost, host=True, on_error="fail", bounds=(jnp.full(2, -1.0), jnp.full(2, 3.0))
)
points = []


def remember(step):
    points.append(np.asarray(step.query.x)[np.asarray(step.query.mask)])


with contextlib.ExitStack() as stack:
    try:
        from distributed import Client

        client = stack.enter_context(
            Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None)
        )
        executor = client.get_executor(pure=False)
    except ImportError:
        executor = stack.enter_context(ThreadPoolExecutor(2))
    solution = tolerax.solve(
        problem,
        tolerax.CDSM(),
        jnp.array([-0.5, 0.0]),
        max_work=150,
        callback=remember,
        executor=executor,
    )
print(f"evaluated by {type(executor).__name__}")
print(solution.message)
print(f"{solution.value:.4f} at {solution.x}, {solution.state.failures} points failed")

# %%
# Where it looked: model steps gather around the best point, polls around them, and the cover
# spreads over what was left out.

seen = np.concatenate(points)
fails = seen[:, 0] + 0.5 * seen[:, 1] > 2.0
grid = np.linspace(-1, 3, 200)
a, b = np.meshgrid(grid, grid)
value = np.ceil(3 * (a - 1.5) ** 2) / 2 + (b - 1.2) ** 2 + 0.5 * (a - 2) ** 2
value[a + 0.5 * b > 2.0] = np.nan

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.contourf(a, b, value, 30, cmap="Greys")
left.plot(*seen[~fails].T, ".", label="evaluated")
left.plot(*seen[fails].T, "x", color="C3", label="failed")
left.plot(*solution.x, "*", color="C1", markersize=14, label="best")
left.set(xlabel="$x_0$", ylabel="$x_1$")
left.legend(loc="lower left")
rows = solution.history.rows()
right.semilogy(rows["poll_radius"], label="poll radius")
right.semilogy(rows["covering_resolution"], label="covering resolution")
right.set(xlabel="answer", ylabel="in units of the first radius")
right.legend()
figure.tight_layout()
plt.show()
