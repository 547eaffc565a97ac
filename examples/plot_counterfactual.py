r"""
What would have to change: a counterfactual
===========================================

A classifier takes a picture for one digit. What is the smallest change after which it takes it for
another? Among all pictures the answer is noise that nobody sees. So the change is made to the 64
latent variables x of a variational autoencoder, whose decoder makes digits of them:

.. math::

    \min_x \|x - x_0\|^2 \quad \text{such that} \quad
    \max_{j \ne k} z_j + 1 \le z_k, \qquad \bigl|\|x\| - \sqrt{64}\bigr| \le 1 ,

where z are the logits of the classifier for the decoded picture and k is the digit that is wanted.
The second constraint keeps x where samples of the latent distribution lie.
"""

import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.problems.library import digits_counterfactual

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# Autoencoder and classifier are trained on the digits of scikit-learn, which takes a few seconds.

known = digits_counterfactual(seed=3, steps=90 if SMALL else 2000)
print(known.description)

# %%
# Both networks have kinks, and so has the constraint, which is a maximum. Attacks step along the
# tangents on both sides of a kink; ``CDSM`` asks for values only. With ``then=()`` the run ends
# where attacks stall; without it, direct search would go on from there.

budget = 150 if SMALL else 1500
ends = {}
for solver in (tolerax.DirectionalAttack(then=()), tolerax.CDSM()):
    name = type(solver).__name__
    ends[name] = tolerax.solve(
        known.problem, solver, known.x0, max_steps=budget, max_work={"points": budget}
    )
    end = ends[name]
    print(f"{name}: {end.value:.2f}, violation {end.violation:.0e}, {end.work.points} points")

# %%
# The pictures, and what the classifier says of them.

x = ends["DirectionalAttack"].x
assert known.image is not None
before, after = known.original, known.image(x)
change = np.abs(after - before).max()
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), width_ratios=(1, 1, 1, 2))
for axis, picture, title in [(axes[0], before, "before"), (axes[1], after, "after")]:
    axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=title)
axes[2].imshow(after - before, cmap="RdBu_r", vmin=-change, vmax=change)
axes[2].set(title="change")
for axis in axes[:3]:
    axis.set(xticks=[], yticks=[])
digits = np.arange(10)
logits = known.problem.goal.prediction
axes[3].bar(digits - 0.2, logits(known.x0), 0.4, label="before")
axes[3].bar(digits + 0.2, logits(x), 0.4, label="after")
axes[3].set(xticks=digits, title="logits")
axes[3].legend()
figure.tight_layout()
plt.show()
