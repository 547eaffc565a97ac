r"""
Learn a denoiser from pictures
==============================

Total-variation denoising removes noise and keeps edges. It has two parameters, and they decide
everything: a weight :math:`w` and a smoothing :math:`\nu`. For a noisy picture :math:`b` the
denoised one is

.. math::

    y(x) = \arg\min_y\ \tfrac12 \|y - b\|^2 + w \sum_{\text{pixels}} \sqrt{|\nabla y|^2 + \nu^2},
    \qquad x = (\log w, \log \nu).

Nobody wants to choose them by hand. Given pictures whose clean versions are known, we choose them
so that the denoised pictures are as close as possible to the clean ones. That is a bilevel problem:
each evaluation of the error hides ten minimizations over 9216 pixels, which are never exact.

We have ten pictures, and noise of standard deviation 0.1.
"""

import argparse
import os

import jax
import jax.numpy as jnp

import tolerax
from tolerax.problems.library import tv_denoising

jax.config.update("jax_enable_x64", True)

arguments = argparse.ArgumentParser(description="Learn a total-variation denoiser.")
arguments.add_argument("--save", metavar="FILE", help="save the picture of the result there")
save = arguments.parse_args().save
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

# %%
# The problem is ready-made. Its bounds keep the search where the denoised pictures are neither the
# noisy ones nor blank.

size, pictures = (48, 4) if small else (96, 10)
training = tv_denoising(seed=0, size=size, pictures=pictures, bounds=(-10.0, -1.0))
print(training.description)

# %%
# The solver chooses how accurately the pictures are denoised in every step: coarsely while the
# steps are long, more finely as they become short. There is nothing to tune. It stops when the norm
# of the gradient, with the bound on its error, has fallen to a thousandth of that at the start.

solver = tolerax.InexactLineSearch(rtol=1e-3)
solution = tolerax.solve(training.problem, solver, training.x0, progress=True)

# %%
# The value lies in the interval and the gradient within its bound, because every constant behind
# them has been proved for this problem.

print(solution.summary())

weight, smoothing = jnp.exp(solution.x)
print(f"\nlearned: weight {weight:.4f}, smoothing {smoothing:.5f}")

# %%
# Does it help on pictures that it has not seen? Another seed draws other crops and other noise, and
# the parameters do not depend on the size of the pictures.

test = tv_denoising(seed=8, size=64 if small else 144)


def denoise(data, x):
    """The pictures denoised with the parameters x."""
    return data.problem.solution(x, tolerax.Accuracy(1e-2, 1e-2))


def versions(data):
    """The pictures as they come, and denoised with the parameters of the start and of the end."""
    start, learned = denoise(data, data.x0), denoise(data, solution.x)
    return {"noisy": data.noisy, "start": start, "learned": learned}


unseen = versions(test)
print("mean PSNR in dB" + "".join(f"{name:>9}" for name in unseen))
for name, data, results in ("training", training, versions(training)), ("unseen", test, unseen):
    print(f"{name:15}" + "".join(f"{float(data.psnr(y)):9.2f}" for y in results.values()))

# %%
# Four of the unseen pictures:

import matplotlib.pyplot as plt

columns = {"clean": test.clean, **unseen}
shown = (0, 2, 3, 4)
figure, axes = plt.subplots(len(shown), 4, figsize=(8, 2.15 * len(shown)), layout="constrained")
for row, k in zip(axes, shown, strict=True):
    for axis, (name, results) in zip(row, columns.items(), strict=True):
        axis.imshow(results[k], cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
        error = float(jnp.mean((results[k] - test.clean[k]) ** 2))
        label = "" if name == "clean" else f", {-10 * jnp.log10(error):.1f} dB"
        axis.set_title(name + label, fontsize=10)
if save:
    figure.savefig(save, dpi=150)
    print(f"saved {save}")
else:
    plt.show()
