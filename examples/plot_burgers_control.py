r"""
Hold a wave that wants to break
===============================

A wave of Burgers' equation

.. math::

    \partial_t y + \partial_s \tfrac12 y^2 = \nu\, \partial_{ss} y + u

steepens into a shock: crests travel right, troughs left. Which force u(t, s) keeps it as it was at
the beginning? With implicit Euler steps the cost of a force,

.. math::

    \tfrac12 \iint (y - y_0)^2 + \tfrac{\alpha}{2} \iint u^2 ,

takes a nonlinear equation in every step, and its gradient a sweep back through all of them. How
accurately each step is solved is for the optimizer to say.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import tolerax
from tolerax.inner import Laplacian

jax.config.update("jax_enable_x64", True)
small = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
n, steps = (31, 20) if small else (127, 80)
nu, alpha = 0.01, 1e-3

# %%
# The equation by central differences, and a preconditioner for the steps: the diffusion alone,
# which a sine transform inverts. Costs are integrals, so they carry the length of a cell; a control
# in time and space is measured by the product of both lengths.

laplacian = Laplacian((n,))
h, dt = 1 / (n + 1), 1 / steps
s = jnp.linspace(h, 1 - h, n)
wave = jnp.sin(2 * jnp.pi * s)


def field(t, y, u):
    flux = jnp.pad(0.5 * y**2, 1)
    return u - (flux[2:] - flux[:-2]) / (2 * h) - nu * laplacian.mv(y)


def running_cost(t, y, u):
    return 0.5 * h * (jnp.sum((y - wave) ** 2) + alpha * jnp.sum(u**2))


def diffusion(dt):
    return lambda r: laplacian.solve(r, 1 / (dt * nu)) / (dt * nu)


problem = tolerax.TimeDependent(
    field,
    None,
    wave,
    running_cost=running_cost,
    controls=lambda u: u,
    method=tolerax.ImplicitEuler(steps, preconditioner=diffusion),
    weight=h,
    metric=h * dt,
)

# %%
# Newton's method on the whole force at once: a product with the Hessian is one sweep forward and
# one back, linear in all steps.

zero = jnp.zeros((steps, n))
solution = tolerax.solve(problem, tolerax.InexactNewton(rtol=1e-5, atol=0.0), zero)
model = solution.state.solver_state.model
print(solution.message.split(":")[0])
print(f"{solution.steps} evaluations, {model.products} Hessian products")
print(f"cost {solution.value:.5f}, error at most {solution.value_error:.0e} (estimated)")

# %%
# States are no part of the answer, so the pictures take a march of their own.


@jax.jit
def march(force):
    def step(y, u):
        def newton(_, z):
            residual = lambda z: z - y - dt * field(0.0, z, u)  # noqa: E731
            return z - jnp.linalg.solve(jax.jacfwd(residual)(z), residual(z))

        z = jax.lax.fori_loop(0, 5, newton, y)
        return z, z

    return jax.lax.scan(step, wave, force)[1]


figure, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
pictures = {"left alone": march(zero), "held": march(solution.x), "force": solution.x}
for ax, (name, picture) in zip(axes, pictures.items(), strict=True):
    shown = ax.imshow(picture, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", aspect="auto")
    ax.set(title=name, xlabel="s")
    figure.colorbar(shown, ax=ax, shrink=0.85)
axes[0].set_ylabel("t")
figure.tight_layout()

# %%
# Left alone the wave breaks, and the shock uses it up. The force lets go shortly before the end:
# what happens afterwards costs nothing.

figure, ax = plt.subplots(figsize=(5.5, 3.2))
ax.plot(s, wave, "k:", label="at the beginning")
for name in ("left alone", "held"):
    ax.plot(s, pictures[name][-1], label=f"{name}, at the end")
ax.set(xlabel="s", ylabel="y")
ax.legend()
figure.tight_layout()

# %%
# The accuracies that the optimizer asked for, from evaluation to evaluation:

rows = solution.history.rows()
figure, ax = plt.subplots(figsize=(5.5, 3.2))
known = rows["gradient_norm"] > 0
ax.semilogy(rows["gradient_norm"][known], "o-", label="gradient")
ax.semilogy(rows["gradient_error"][known], "s-", label="bound on its error")
ax.semilogy(rows["state_tolerance"][known], "^--", label="tolerance of states")
ax.set(xlabel="evaluation")
ax.legend()
figure.tight_layout()
plt.show()
