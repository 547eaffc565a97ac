"""
A plain function, and a loop of your own
========================================

A function without a solver inside is the easy case: its values and gradients have no error. Here is
every way to minimize one, on Rosenbrock's function, whose valley bends like a banana.
"""

import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from tolerax.checkpoint import Checkpoint

jax.config.update("jax_enable_x64", True)


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


start = np.array([-1.2, 1.0])

# %%
# SciPy's interface
# -----------------
#
# The arguments and the result are those of ``scipy.optimize.minimize``. JAX differentiates.

result = tolerax.minimize(rosenbrock, start, bounds=[(-2, 2), (-2, 2)])
print(result.message)
print("x =", result.x, " calls:", result.nfev, " |x - 1|:", np.linalg.norm(result.x - 1))

# %%
# Our interface
# -------------
#
# Wrap the function as a problem and choose a solver. The solution knows how well it did and keeps a
# history, so that no callback is needed to plot a run.

problem = tolerax.Objective(rosenbrock)
solver = tolerax.InexactLineSearch()
solution = tolerax.solve(problem, solver, jnp.asarray(start))
print(solution.summary())

# %%
# A callback
# ----------
#
# A callback is called after each answer. It may look at anything and stop the run.

path = []


def watch(step):
    path.append(step.query.x)
    if step.value < 1e-6:
        raise StopIteration


stopped = tolerax.solve(problem, solver, jnp.asarray(start), callback=watch)
print(stopped.message, f"Value {float(stopped.value):.1e} after {int(stopped.steps)} answers.")

# %%
import matplotlib.pyplot as plt

x, y = np.meshgrid(np.linspace(-1.7, 1.7, 300), np.linspace(-0.6, 1.9, 300))
height = np.log10(100 * (y - x**2) ** 2 + (1 - x) ** 2 + 1e-3)
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.contourf(x, y, height, levels=20, cmap="Blues_r")
axis.plot(*np.array(path).T, ".-", color="tab:orange", label="points that were asked for")
axis.plot(1, 1, "*", color="black", markersize=14, label="minimum")
axis.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.7, 1.7), ylim=(-0.6, 1.9))
axis.legend(loc="lower left")
plt.show()

# %%
# Checkpoints
# -----------
#
# A run that is saved can be stopped at any moment, even killed, and goes on from the last file to
# the same result, bit by bit. Here a limit on the work stops it.

with tempfile.TemporaryDirectory() as folder:
    saved = Checkpoint(Path(folder) / "rosenbrock", every_steps=5)
    part = tolerax.solve(problem, solver, jnp.asarray(start), max_work=15, checkpoint=saved)
    print(part.message)
    # Later, in another process: the same call finds the file and continues.
    whole = tolerax.solve(problem, solver, jnp.asarray(start), checkpoint=saved)
    print(f"continued to {int(whole.steps)} answers:", whole.message)
print("same as in one go:", bool(jnp.all(whole.x == solution.x)))

# %%
# A loop of your own
# ------------------
#
# A solver asks and is told, so the loop can be yours. Nothing of the problem is compiled into the
# solver: the answers may come from a laboratory.

ask, tell = eqx.filter_jit(solver.ask), eqx.filter_jit(solver.tell)
state = solver.init(
    tolerax.Start(
        x=jnp.asarray(start),
        bounds=None,
        carry=problem.cold_start(),
        key=jax.random.key(0),
        answer=problem.evaluate,
    )
)
answers = 0
while not solver.terminate(state)[0]:
    query = ask(state)
    evaluation = problem.evaluate(query)
    state = tell(state, query, evaluation)
    answers += 1
done, status = solver.terminate(state)
print(f"{answers} answers:", tolerax.Status[status])
