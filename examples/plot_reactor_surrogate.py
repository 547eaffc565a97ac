r"""
A reactor, through a network that stands for it
===============================================

A batch of A becomes B, which is wanted, and B becomes C, which is not. Both reactions give off heat
and run away when it gets too hot. How cold should the coolant be, and when should one stop?

.. math::

    A \xrightarrow{k_1(T)} B \xrightarrow{k_2(T)} C , \qquad
    \dot T = 30\,(k_1 c_A + 0.8\, k_2 c_B) - 4\,(T - T_\text{coolant})

The kinetics are solved by diffrax. A network learns the trajectories from 400 solutions, and the
search asks the network; in the end the simulator is asked whether it agrees. On the way the reactor
must stay below 370 K (at each of 20 times); at the end 80 % of A must be used up, with at most a
tenth as much C as B.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.problems.library import reactor
from tolerax.problems.library.surrogates import Reactor

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

known = reactor(samples=40 if SMALL else 400, steps=300 if SMALL else 4000)
problem = known.problem

# %%
# From a start at which the reactor runs away. ``then=()`` leaves attacks alone; by default direct
# search would go on where they stall.

path = []
solution = tolerax.solve(
    problem,
    tolerax.DirectionalAttack(then=()),
    jnp.array([0.9, 0.6]),
    max_steps=300,
    callback=lambda step: path.append(np.asarray(step.run.best.x)),
)
coolant, duration = Reactor().controls(solution.x)
print(f"coolant {coolant:.1f} K, {duration:.2f} h; {solution.work.points} points of the network")

# %%
# An optimum of a network may be an error of the network: ``recheck`` asks the simulator.

seen = problem.recheck(solution.x)
print(f"productivity {seen.value:.4f}, the network says {seen.predicted_value:.4f} mol/L/h")
print(f"constraints violated by {seen.violation:.4f} in the simulator")

# %%
# Left: what the network says of the square, where it allows it, and the best points so far. Right:
# the trajectory at the optimum by the simulator (lines) and by the network (dots).

side = np.linspace(0, 1, 81)
square = jnp.stack(jnp.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
query = tolerax.Query(
    square,
    tolerax.Accuracy(jnp.ones(len(square)), jnp.ones(len(square))),
    mask=jnp.ones(len(square), bool),
    derivatives=0,
)
answer = problem.evaluate(query)
assert answer.violation is not None
allowed = jnp.where(answer.violation <= 1e-6, -answer.value, jnp.nan).reshape(81, 81)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
colours = left.contourf(side, side, allowed.T, 20)
figure.colorbar(colours, ax=left, label="mol of B per L and h")
left.plot(*np.array(path).T, "o-", color="C3", markersize=4, label="best so far")
left.plot(*solution.x, "*", color="C1", markersize=14, label="the end")
left.set(xlabel="coolant, 290 to 350 K", ylabel="duration, 0.5 to 6 h")
left.legend(loc="upper left")
truth, said = Reactor()(solution.x), problem.goal.prediction(solution.x)
times = np.linspace(0, float(duration), 21)[1:]
for row, name in enumerate(("A", "B", "C")):
    right.plot(times, truth[row], color=f"C{row}", label=name)
    right.plot(times, said[row], ".", color=f"C{row}")
right.set(xlabel="h", ylabel="mol/L")
right.legend(loc="center right")
heat = right.twinx()
heat.plot(times, truth[3], color="0.4")
heat.plot(times, said[3], ".", color="0.4")
heat.axhline(370, color="0.4", linestyle=":")
heat.set(ylabel="temperature (grey), K")
figure.tight_layout()
plt.show()
