r"""
A preconditioner that was trained
=================================

A preconditioner is any callable that resembles the inverse, so it may be a trained one. Here it is
for diffusion with a coefficient k that varies from place to place,

.. math::

    A_k y = -\nabla \cdot (k \nabla y) = b .

The learned one is :math:`P^{-1} = S (-\Delta_h)^{-1} S`, with a fast solve of Poisson's equation
between two diagonal scalings. It is symmetric and positive definite whatever S is, so plain
conjugate gradients may use it. With :math:`S = k^{-1/2}` it is a classic (Concus and Golub, 1973).
A small convolutional network corrects that S from the coefficient around a point.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.inner import Diffusion, Laplacian, Multigrid

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
n, fields, iterations, width = (15, 4, 5, 3) if small else (15, 24, 150, 8)

# %%
# Coefficients: a smooth random field, and a random half of the square whose k is 20 times as large.


def logarithm(seed, n):
    """log k at all points, those of the boundary included."""
    rng = np.random.default_rng(seed)
    s = np.linspace(0, 1, n + 2)
    a, b = np.meshgrid(s, s, indexing="ij")
    smooth, pattern = np.zeros_like(a), np.zeros_like(a)
    for i in range(5):
        for j in range(5):
            wave = np.cos(np.pi * i * a + rng.uniform(0, 6)) * np.cos(np.pi * j * b)
            first, second = rng.normal(size=2) / (1 + i + j)
            smooth, pattern = smooth + first * wave, pattern + second * wave
    return jnp.asarray(smooth + np.log(20) * (pattern > np.median(pattern)))


# %%
# The network sees log k without its mean and gives the correction of log S: two layers of
# convolutions, then one number a point. It begins at 0, which is the classic.


def convolved(w, x):
    return jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME")[0]


def scaling(weights, log_k):
    x = (log_k - jnp.mean(log_k))[None]
    x = jnp.tanh(convolved(weights["first"], x))
    x = jnp.tanh(convolved(weights["second"], x))
    correction = jnp.tensordot(weights["last"], x, 1)
    return jnp.exp(correction - 0.5 * log_k)[1:-1, 1:-1]


def inverse(weights, log_k, laplacian):
    s = scaling(weights, log_k)
    return lambda r: s * laplacian.solve(s * r)


# %%
# What is minimized is the logarithm of what eight steps of conjugate gradients leave of the error
# in the energy norm, over coefficients that are kept apart from those of the comparison below. It
# is a plain function of the weights, so the training is a run of this library.


def step(inverse, operator, state):
    """A step of conjugate gradients; y is the iterate, z = P^-1 r."""
    y, r, z, p = state
    ap = operator(p)
    length = jnp.vdot(r, z) / jnp.vdot(p, ap)
    y, new = y + length * p, r - length * ap
    z_new = inverse(new)
    return y, new, z_new, z_new + jnp.vdot(new, z_new) / jnp.vdot(r, z) * p


def first(inverse, operator, x):
    b = operator(x)
    return jnp.zeros_like(x), b, inverse(b), inverse(b)


def remaining(operator, y, x):
    """The energy norm of the error over that at the beginning."""
    e = x - y
    return jnp.sqrt(jnp.vdot(e, operator(e)) / jnp.vdot(x, operator(x)))


training = jnp.stack([logarithm(1000 + i, n) for i in range(fields)])
rng = np.random.default_rng(1)
solutions = jnp.asarray(rng.normal(size=(fields, n, n)))
coarse = Laplacian((n, n))


def loss(weights):
    def one(log_k, b):
        operator = Diffusion.of(jnp.exp(log_k)).mv
        solve, x = inverse(weights, log_k, coarse), coarse.solve(b)
        state = first(solve, operator, x)
        more = lambda state, _: (step(solve, operator, state), None)  # noqa: E731
        state, _ = jax.lax.scan(more, state, length=8)
        return jnp.log(remaining(operator, state[0], x))

    return jnp.mean(jax.vmap(one)(training, solutions))


begin = {
    "first": jnp.asarray(rng.normal(size=(width, 1, 5, 5)) / 5),
    "second": jnp.asarray(rng.normal(size=(width, width, 3, 3)) / 9),
    "last": jnp.zeros(width),
}
trained = tolerax.solve(
    tolerax.Objective(loss), tolerax.InexactLineSearch(atol=1e-3), begin, max_steps=iterations
)
print(f"error after 8 steps: {jnp.exp(loss(begin)):.1e} -> {jnp.exp(trained.value):.1e}")

# %%
# The comparison: steps until the same is 1e-6, on coefficients that were not seen, and on grids
# that were not seen either.


@partial(jax.jit, static_argnums=0)
def count(kind, log_k, b):
    laplacian, diffusion = Laplacian(b.shape), Diffusion.of(jnp.exp(log_k))
    solve = {
        "none": lambda r: r,
        "diagonal": lambda r: r / diffusion.diagonal,
        "Poisson": laplacian.solve,
        "scaled Poisson": inverse(begin, log_k, laplacian),
        "learned": inverse(trained.x, log_k, laplacian),
        "multigrid": Multigrid.of(diffusion),
    }[kind]
    x = laplacian.solve(b)
    unfinished = lambda state: remaining(diffusion.mv, state[1][0], x) > 1e-6  # noqa: E731
    more = lambda state: (state[0] + 1, step(solve, diffusion.mv, state[1]))  # noqa: E731
    return jax.lax.while_loop(unfinished, more, (0, first(solve, diffusion.mv, x)))[0]


kinds = ("none", "diagonal", "Poisson", "scaled Poisson", "learned", "multigrid")
sizes = (15,) if small else (15, 31, 63)
means = {kind: [] for kind in kinds}
for size in sizes:
    unseen = [logarithm(seed, size) for seed in range(2 if small else 10)]
    b = jnp.asarray(np.random.default_rng(2).normal(size=(size, size)))
    for kind in kinds:
        means[kind].append(float(np.mean([int(count(kind, log_k, b)) for log_k in unseen])))
print("unknowns      " + "".join(f"{size:>5} x {size:<3}" for size in sizes))
for kind in kinds:
    print(f"{kind:14}" + "".join(f"{mean:11.1f}" for mean in means[kind]))

# %%
# The training about halves the steps of the classic scaling, and more on finer grids, where it was
# not trained. Multigrid, which was made for this equation, needs fewer still. A step with a scaled
# solve costs one fast solve, one with multigrid a cycle; the training is not counted.

figure, axes = plt.subplots(1, 3, figsize=(9.5, 3))
log_k = logarithm(0, 15 if small else 63)
pictures = {
    "log k": log_k[1:-1, 1:-1],
    "learned / classic scaling": scaling(trained.x, log_k) / scaling(begin, log_k),
}
for ax, (name, picture) in zip(axes, pictures.items(), strict=False):
    shown = ax.imshow(picture.T, origin="lower", extent=(0, 1, 0, 1))
    ax.set(title=name, xticks=[], yticks=[])
    figure.colorbar(shown, ax=ax, shrink=0.85)
for kind in kinds[2:]:
    axes[2].plot(sizes, means[kind], "o-", label=kind)
axes[2].set(xlabel="points along an axis", ylabel="iterations")
axes[2].set_ylim(0, 1.5 * max(means["Poisson"]))  # room for the legend
axes[2].legend(loc="upper left", fontsize="small", ncols=2)
figure.tight_layout()
plt.show()
