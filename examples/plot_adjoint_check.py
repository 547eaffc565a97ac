r"""
Is the adjoint right?
=====================

Gradients of nested problems are computed by adjoint equations, and adjoints are easily wrong: a
sign, a forgotten boundary term, a tolerance that was meant for something else. The test for it is
Taylor's formula. For a right gradient g

.. math::

    |\varphi(x + h v) - \varphi(x) - h \langle g, v \rangle| = O(h^2),

for a wrong one the remainder is of first order only.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tolerax
from tolerax.inner import Laplacian

jax.config.update("jax_enable_x64", True)

# %%
# A semilinear equation, :math:`-\Delta y + y^3 = u`, with its state and adjoint solved to
# tolerances that we choose. Each of its derivatives is compared with differences, those of cost and
# residual one by one. With `hessian=True` products with the Hessian are compared too.

n = 15
laplacian, area = Laplacian((n, n)), 1 / (n + 1) ** 2


def make(cube):
    return tolerax.PDEConstrained(
        lambda y, u: area * (laplacian.mv(y) + cube(y) - u),
        lambda y, u: 0.5 * area * (jnp.sum((y - 1) ** 2) + 1e-3 * jnp.sum(u**2)),
        jnp.zeros((n, n)),
        riesz=lambda u: lambda r: laplacian.solve(r) / area,
        metric=area,
        stability=1.0,
        monotone=True,
        symmetric=True,
    )


problem = make(lambda y: y**3)
x, v = (jnp.asarray(300 * a) for a in np.random.default_rng(0).normal(size=(2, n, n)))
print(tolerax.check_gradient(problem, x))

# %%
# The slope is the rate at which the remainder falls with the step: 2 where a derivative is right.
# Here somebody wrote a derivative rule by hand. The whole gradient is wrong, and the table names
# the part that made it so.


@jax.custom_jvp
def cube(y):
    return y**3


@cube.defjvp
def rule(primals, tangents):
    return primals[0] ** 3, 2 * primals[0] ** 2 * tangents[0]


print(tolerax.check_gradient(make(cube), x))

# %%
# The remainders themselves. A gradient is as right as its solves are accurate: where the adjoint is
# solved to a loose tolerance the remainder leaves the line of second order and falls with h only,
# as for a wrong gradient. To an optimizer near a solution it is one. The evaluation knows: the
# dotted lines are h times the bound on the error of its gradient.

evaluate = eqx.filter_jit(lambda p, x, accuracy: p.evaluate(tolerax.Query(x, accuracy)))
steps = np.logspace(0, -6, 13)
tight = tolerax.Accuracy(1e-11, 1e-11)
values = np.array([float(evaluate(problem, x + h * v, tight).value) for h in steps])
start = float(evaluate(problem, x, tight).value)
size = float(jnp.sqrt(area * jnp.sum(v**2)))
figure, ax = plt.subplots(figsize=(6, 4))
for adjoint in (1.0, 1e-1, 1e-2, 1e-11):
    found = evaluate(problem, x, tolerax.Accuracy(1e-11, adjoint))
    remainder = np.abs(values - start - steps * float(jnp.vdot(found.gradient, v)))
    (line,) = ax.loglog(steps, remainder, "o-", label=f"adjoint to {adjoint:g}")
    ax.loglog(steps, steps * size * float(found.gradient_error), ":", color=line.get_color())
ax.set(xlabel="h", ylabel="remainder of first order", ylim=(1e-13, None))
ax.legend()
figure.tight_layout()
plt.show()
