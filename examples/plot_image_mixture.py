"""
An attack on a classifier by a mixture of images
================================================

Which mixture of a hundred handwritten digits does a classifier take for one given digit, with the
very same probabilities? The variables are the logits of the hundred weights, within bounds; the
objective is the squared distance of two vectors of ten probabilities, so that the optimum is 0.

Where the classifier is sure of itself its outputs hardly change, which is hard on a line search.
``DirectionalAttack`` follows the same gradient at many lengths at once.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.problems.library import image_mixture

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# A small convolutional network is trained on the digits of scikit-learn, but for 500 of them. Of
# those the mixture is made.

known = image_mixture(40 if SMALL else 100, seed=1, steps=20 if SMALL else 600)
print(known.description)

# %%
# Both methods get the same number of points; each is one pass through the network.


def run(solver):
    solution = tolerax.solve(known.problem, solver, known.x0, max_steps=300, max_work=300)
    rows = solution.history.rows()
    print(f"{type(solver).__name__}: {float(solution.value):.1e}, {solution.work.points} points")
    return solution.x, rows["points"], rows["best_value"]


attacked, points, values = run(tolerax.DirectionalAttack())
followed, points_before, values_before = run(tolerax.InexactLineSearch())

# %%
# The mixture does not look like the digit that the classifier takes it for: other pictures lead to
# the same ten numbers.

classify = known.problem.goal.prediction
to_target: Any = known.problem.goal.objective
assert known.image is not None
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), width_ratios=(1, 1, 2, 2))
for axis, picture, title in [
    (axes[0], known.original, "the digit"),
    (axes[1], known.image(attacked), "the mixture"),
]:
    axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])
digits = np.arange(10)
axes[2].bar(digits - 0.3, to_target.target, 0.3, label="the digit")
axes[2].bar(digits, classify(attacked), 0.3, label="the mixture")
axes[2].bar(digits + 0.3, classify(known.x0), 0.3, color="0.7", label="equal weights")
axes[2].set(xticks=digits, title="what the classifier says")
axes[2].legend(fontsize="small")
axes[3].loglog(points, jnp.maximum(values, 1e-16), label="DirectionalAttack")
axes[3].loglog(points_before, values_before, "--", label="InexactLineSearch")
axes[3].set(xlabel="points", title="squared distance")
axes[3].legend(fontsize="small")
figure.tight_layout()
plt.show()
