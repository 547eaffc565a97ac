r"""
Learn the filters of a regularizer
==================================

Total variation looks at differences between neighbours. A Field of Experts looks at the responses
of filters :math:`C_k`, each with a weight and a smoothing, and all of it is learned from pictures:

.. math::

    y(x) = \arg\min_y\ \tfrac12 \|y - b\|^2
        + \sum_k w_k \sum_{\text{places}} \sqrt{(C_k y)^2 + \nu_k^2},
    \qquad x = (C_k, \log w_k, \log \nu_k)_k.

Here are eight filters of 3 × 3 pixels, 89 parameters with all weights and smoothings. With a few
pictures and a few thousand passes over them this is a small relative of the real thing.
"""

import os

import jax
import jax.numpy as jnp

import tolerax
from tolerax.problems.library import field_of_experts, tv_denoising

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"

size, pictures = (32, 3) if small else (64, 6)


def problem_with(seed):
    """The problem with the pictures and the noise that the seed draws."""
    return field_of_experts(seed=seed, size=size, pictures=pictures, filters=8, width=3)


experts = problem_with(seed=0)
print(experts.description)

# %%
# The parameters are a pytree. Half of the filters start as differences, along rows and columns and
# along both diagonals; the others are cosines with small weights.

filters = experts.x0["filters"].at[:4].set(0.0).at[:4, 1, 1].set(-1.0)
for k, neighbour in enumerate([(1, 2), (2, 1), (2, 2), (0, 2)]):
    filters = filters.at[k, *neighbour].set(1.0)
x0 = {
    "filters": filters,
    "log_weight": jnp.array(-3.5),
    "log_weights": jnp.array([0.0, 0.0, -0.5, -0.5, -2.0, -2.0, -2.0, -2.0]),
    "log_smoothings": jnp.full(8, -4.0),
}

# %%
# The budget ends this run, not the tolerance: a summary says so, and the certificate holds for the
# point where it stopped.

solver = tolerax.InexactLineSearch(rtol=1e-3)
solution = tolerax.solve(
    experts.problem, solver, x0, max_work=300 if small else 3000, progress=True
)
print(solution.summary())

# %%
# Total variation, with its two parameters learned from the same pictures, is what to beat. Filters
# need whole patches, so that pixels at the rim of a picture are hardly denoised: all methods are
# measured four pixels inside.

tv = tv_denoising(seed=0, size=size, pictures=pictures, bounds=(-10.0, -1.0))
tv_solution = tolerax.solve(tv.problem, tolerax.InexactLineSearch(rtol=1e-2), tv.x0)


def denoise(data, x):
    """The pictures denoised with the parameters x."""
    return data.problem.solution(x, tolerax.Accuracy(1e-2, 1e-2))


def psnr(data, pictures):
    """Mean PSNR four pixels inside the rim."""
    inside = (slice(None), slice(4, -4), slice(4, -4))
    error = jnp.mean((pictures - data.clean)[inside] ** 2, axis=(1, 2))
    return float(-10 * jnp.mean(jnp.log10(error)))


columns = ("noisy", "start", "learned", "total variation")
print("mean PSNR in dB" + "".join(f"{name:>17}" for name in columns))
for name, seed in {"training": 0, "unseen": 8}.items():
    e, t = problem_with(seed), tv_denoising(seed=seed, size=size, pictures=pictures)
    results = e.noisy, denoise(e, x0), denoise(e, solution.x), denoise(t, tv_solution.x)
    print(f"{name:15}" + "".join(f"{psnr(e, y):17.2f}" for y in results))

# %%
# The loss against the work: it would fall further. Total variation is a strong opponent, because
# its one filter pair treats all directions alike, which eight filters have to find out.

import matplotlib.pyplot as plt

rows = solution.history.rows()
work = rows["lower_gradients"] + rows["hessian_products"]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.semilogx(work, rows["best_value"], ".-")
axis.set(xlabel="passes over the data", ylabel="loss")
plt.show()

# %%
# The filters at the start and learned, each scaled to its largest entry, with its weight.


def scale(x):
    """Weight of a filter times its norm: what it contributes."""
    norms = jnp.linalg.norm(x["filters"], axis=(1, 2))
    return jnp.exp(x["log_weight"] + x["log_weights"]) * norms


figure, axes = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for row, x, name in zip(axes, (x0, solution.x), ("start", "learned"), strict=True):
    row[0].set_ylabel(name)
    for axis, c, strength in zip(row, x["filters"], scale(x), strict=True):
        largest = float(jnp.max(jnp.abs(c)))
        axis.imshow(c, cmap="RdBu", vmin=-largest, vmax=largest)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{float(strength):.3f}", fontsize=9)
plt.show()
