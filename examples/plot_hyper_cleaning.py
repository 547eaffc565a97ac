r"""
Find wrong labels
=================

Four in ten training digits have a wrong label, and we do not know which. We have a validation set
with clean labels. Give every training sample a weight :math:`\sigma(x_i)` between 0 and 1, and
choose the weights so that the classifier trained with them does well on the validation set:

.. math::

    \min_x\ \text{validation loss}(y(x)), \qquad
    y(x) = \arg\min_y\ \frac1n \sum_i \sigma(x_i)\,\ell_i(y) + \frac{\varrho}{2} \|y\|^2.

Samples that mislead the classifier lose their weight. This is called hyper-cleaning: 963 weights,
one for each sample, all learned at once.
"""

import os

import jax
import jax.numpy as jnp

import tolerax
from tolerax.problems.library import hyper_cleaning

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

cleaning = hyper_cleaning(seed=0, flipped=0.4)
print(cleaning.description)

# %%
# All weights start at one half. It is enough to bring the gradient down to a tenth: beyond that the
# weights run to 0 and 1, and samples with right labels that the classifier does not need go too.

solver = tolerax.InexactLineSearch(rtol=0.1, atol=0.0)
solution = tolerax.solve(cleaning.problem, solver, cleaning.x0, max_work=600 if small else None)
print(solution.summary())

# %%
# A sample is called wrong when its weight has fallen below one half. The classifier trained with
# the learned weights is measured on clean test samples, beside the one that trusts all labels alike
# and one that is told which labels are right.


def train(x):
    """The classifier trained with the weights sigmoid(x)."""
    return cleaning.problem.solution(x, tolerax.Accuracy(1e-4, 1e-4))


told = jnp.where(cleaning.flipped, -30.0, 30.0)
weights = {"all alike": cleaning.x0, "learned": solution.x, "told": told}
for name, x in weights.items():
    print(f"{name:10} test accuracy {float(cleaning.accuracy(train(x))):.1%}")

flagged = solution.x < 0
print(f"\ncalled wrong {int(flagged.sum())}, really wrong {int(cleaning.flipped.sum())}")
print(f"F1 score {float(cleaning.flip_f1(solution.x)):.3f}")

# %%
# The weights fall into two groups, with few samples in doubt.

import matplotlib.pyplot as plt

learned = jax.nn.sigmoid(solution.x)
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
groups = [learned[~cleaning.flipped], learned[cleaning.flipped]]
axis.hist(groups, bins=25, range=(0, 1), stacked=True, label=["right label", "wrong label"])
axis.set(xlabel="learned weight", ylabel="training samples")
axis.legend()
plt.show()

# %%
# The samples with the smallest weights, each with the label that it came with. Green marks those
# whose label is wrong indeed.

labels = jnp.argmax(cleaning.data.train.targets, axis=1)
worst = jnp.argsort(solution.x)[:24]
figure, axes = plt.subplots(3, 8, figsize=(8, 3.7), layout="constrained")
for axis, i in zip(axes.flat, worst, strict=True):
    axis.imshow(cleaning.data.train.features[i].reshape(8, 8), cmap="gray_r")
    axis.set_axis_off()
    color = "tab:green" if cleaning.flipped[i] else "tab:red"
    axis.set_title(f"“{int(labels[i])}”", color=color, fontsize=11)
plt.show()

# %%
# And where it errs: the right labels that it trusts least.

right = jnp.flatnonzero(~cleaning.flipped)
doubted = right[jnp.argsort(solution.x[right])[:8]]
figure, axes = plt.subplots(1, 8, figsize=(8, 1.4), layout="constrained")
for axis, i in zip(axes.flat, doubted, strict=True):
    axis.imshow(cleaning.data.train.features[i].reshape(8, 8), cmap="gray_r")
    axis.set_axis_off()
    axis.set_title(f"“{int(labels[i])}” {float(learned[i]):.2f}", fontsize=10)
plt.show()
