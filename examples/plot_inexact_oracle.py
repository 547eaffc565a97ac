r"""
How far can an answer be trusted?
=================================

Here we ask the oracle ourselves, without a solver, for a value and a gradient to a tolerance, and
hold the answers and their bounds against the truth.

The truth has to be known for that. So we take two least-squares problems, one inside the other,
whose solution, value and gradient can be written down:

.. math::

    \min_x\ \tfrac12 \|A_1 y(x) - b_1\|^2, \qquad
    y(x) = \arg\min_y\ \tfrac12 \|A_2 y + A_3 x - b_2\|^2.
"""

import jax
import jax.numpy as jnp

import tolerax
from tolerax.problems.library import quadratic

jax.config.update("jax_enable_x64", True)

least_squares = quadratic(seed=0)
print(least_squares.description)
problem, x = least_squares.problem, least_squares.optimum + 0.1
truth, true_gradient = least_squares.value(x), least_squares.gradient(x)

# %%
# One question
# ------------
#
# A query says where, and to which accuracy: one tolerance for the lower-level solution and one for
# the adjoint. Each question here starts cold, so that no answer profits from an earlier one.

query = tolerax.Query(x, tolerax.Accuracy(state=1e-2, adjoint=1e-2))
answer = problem.evaluate(query)

print(f"value {float(answer.value):.8f}, error at most {float(answer.value_error):.1e}")
print(f"truth {float(truth):.8f}, error {abs(float(answer.value - truth)):.1e}")
print("achieved:", answer.achieved)
print("constants:", answer.provenance)
print("work:", answer.work.as_dict())

# %%
# Many questions
# --------------
#
# From a tenth down to a hundred-millionth. The value gains two digits for each digit of the
# lower-level solution, because the adjoint corrects it.


def ask(problem, tolerance):
    """Errors and their bounds at one tolerance: value, bound, gradient, bound; and the work."""
    accuracy = tolerax.Accuracy(tolerance, tolerance)
    answer = problem.evaluate(tolerax.Query(x, accuracy))
    error = jnp.linalg.norm(answer.gradient - true_gradient)
    value_error = jnp.abs(answer.value - truth)
    return value_error, answer.value_error, error, answer.gradient_error, answer.work.units


def table(problem, tolerances):
    """One row a tolerance; compiled once for all of them."""
    once = jax.jit(lambda tolerance: ask(problem, tolerance))
    return jnp.array([once(tolerance) for tolerance in tolerances])


tolerances = 10.0 ** -jnp.arange(1, 8.5, 0.5)
energy = table(problem, tolerances)
print("tolerance   value: error    bound   gradient: error    bound   work")
for tolerance, row in zip(tolerances, energy, strict=True):
    value, value_bound, error, bound, work = map(float, row)
    print(f"{tolerance:9.0e}{value:15.1e}{value_bound:9.1e}{error:18.1e}{bound:9.1e}{work:7.0f}")

# %%
# No error exceeds its bound. The closed form has a rounding error too: in the last lines the error
# of the value is mostly that of the "truth", and so it gets an allowance.

rounding = 1e-14 * truth
assert jnp.all(energy[:, 0] <= energy[:, 1] + rounding)
assert jnp.all(energy[:, 2] <= energy[:, 3])

# %%
# The published bounds measure errors in the Euclidean norm and divide them by the smallest
# eigenvalue of the Hessian. They are available for comparison. The energy norm comes closer to the
# truth. Errors that are smaller than the allowance are left out of the picture.

euclidean = table(quadratic(seed=0, norm="euclidean").problem, tolerances)

import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharex=True, sharey=True)
for axis, rows, name in zip(axes, (energy, euclidean), ("energy", "Euclidean"), strict=True):
    work = rows[:, 4]
    for column, color, label in ((0, "tab:blue", "value"), (2, "tab:orange", "gradient")):
        error = jnp.where(rows[:, column] > rounding, rows[:, column], jnp.nan)
        axis.loglog(error, rows[:, column + 1], "o", color=color, label=label)
    axis.loglog([1e-10, 1e2], [1e-10, 1e2], ":", color="gray", label="bound = error")
    axis.set(title=f"{name} norm", xlabel="true error")
axes[0].set_ylabel("bound")
axes[0].legend()
plt.show()

# %%
# How much larger than the error is the bound? A factor of ten asks for one digit more than needed.

for name, rows in {"energy": energy, "Euclidean": euclidean}.items():
    looseness = jnp.median(rows[:, 3] / rows[:, 2])
    print(f"{name:10} bound / error of the gradient: {float(looseness):.1f} (median)")
