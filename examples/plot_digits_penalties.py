r"""
640 penalties for a classifier
==============================

Softmax regression of the handwritten digits has one weight for each of 64 pixels and 10 classes. A
penalty keeps the weights small. Usually there is one penalty for all, found on a grid. Here every
weight has its own, and all 640 are learned from validation samples:

.. math::

    \min_x\ \text{validation loss}(y(x)), \qquad
    y(x) = \arg\min_y\ \text{training loss}(y) + \tfrac12 \sum_{i} e^{x_i} y_i^2.

A grid over 640 numbers is out of the question; gradients are not. They are as good as the solution
of the lower level, and the lower level is as ill-conditioned as its smallest penalty.
"""

import os

import jax
import jax.numpy as jnp

import tolerax
from tolerax.problems.library import digits_penalties

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# The digits come with scikit-learn. Bounds on the log-penalties keep each between 0.0003 and 7.

digits = digits_penalties(seed=0, bounds=(-8.0, 2.0), prove_smoothness=True)
print(digits.description)

# %%
# A callback sees every answer. It notes the losses of the best point so far, and how much work was
# done: gradients of the training loss and products with its Hessian, each one pass over the data.

noted = []


def note(step):
    weights = step.run.best.carry.y.reshape(64, 10)
    noted.append((step.run.work.units, step.value, digits.test_loss(weights)))


solver = tolerax.InexactLineSearch(rtol=1e-2, atol=0.0)
solution = tolerax.solve(
    digits.problem, solver, digits.x0, callback=note, max_work=300 if small else None
)
print(solution.summary())

# %%
# The test samples were used for nothing else:

start = digits.problem.solution(digits.x0, tolerax.Accuracy(1e-4, 1e-4))
learned = digits.problem.solution(solution.x, tolerax.Accuracy(1e-4, 1e-4))
for name, weights in {"start": start, "learned": learned}.items():
    accuracy, loss = float(digits.accuracy(weights)), float(digits.test_loss(weights))
    print(f"{name:8} test accuracy {accuracy:.1%}, test loss {loss:.3f}")

# %%
# Most of the gain comes early. Later the validation loss falls while the test loss does not: 640
# penalties can overfit 475 validation samples as weights can overfit training samples.
#
# The accuracy asked for is what the next decision needs. Both tolerances fall as the steps become
# short, by orders of magnitude and not by a schedule.

import matplotlib.pyplot as plt

work, validation, test = jnp.array(noted).T
rows = solution.history.rows()
done = rows["lower_gradients"] + rows["hessian_products"]

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(work, validation, ".-", label="validation")
left.plot(work, test, ".-", label="test")
left.set(xlabel="passes over the data", ylabel="loss", xscale="log", ylim=(0, None))
left.legend()
right.semilogy(done, rows["state_tolerance"], ".-", label="lower level")
right.semilogy(done, rows["adjoint_tolerance"], ".-", label="adjoint")
right.set(xlabel="passes over the data", ylabel="accuracy asked for", xscale="log")
right.legend()
plt.show()

# %%
# The learned penalties as pictures, one for each class. Dark pixels may be used freely, bright ones
# are switched off. The outer columns, where no digit has ink, keep the penalty of the start.

figure, axes = plt.subplots(2, 5, figsize=(8, 3.6), layout="constrained")
for k, axis in enumerate(axes.flat):
    axis.imshow(solution.x[:, k].reshape(8, 8), cmap="viridis", vmin=-8, vmax=2)
    axis.set(title=str(k), xticks=[], yticks=[])
figure.colorbar(axes[0, 0].images[0], ax=axes, label="log penalty", shrink=0.8)
plt.show()
