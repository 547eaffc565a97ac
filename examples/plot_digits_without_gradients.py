"""
A network trained without gradients
===================================

Handwritten digits of scikit-learn (8 by 8 pixels), a network with one hidden layer and 1,510
weights, and a solver that sees values of the loss on mini-batches only.
"""

import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tolerax
from tolerax.solvers import ConsensusHopping

SMALL = os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small"
PARTICLES, BATCH = 100, 100
ROUNDS, STEPS = (2, 20) if SMALL else (20, 100)

images, labels = load_digits(return_X_y=True)
parts = train_test_split(images / 16, labels, test_size=0.3, random_state=0, stratify=labels)
train_x, test_x, train_y, test_y = (jnp.asarray(part) for part in parts)

one, two = jax.random.split(jax.random.key(0))
weights = {
    "hidden": 0.2 * jax.random.normal(one, (64, 20)),
    "shift": jnp.zeros(20),
    "out": 0.2 * jax.random.normal(two, (20, 10)),
    "bias": jnp.zeros(10),
}


def network(w, x):
    return jnp.tanh(x @ w["hidden"] + w["shift"]) @ w["out"] + w["bias"]


def loss(w, x, y):
    return -jnp.mean(jax.nn.log_softmax(network(w, x))[jnp.arange(y.size), y])


def accuracy(w, x, y):
    return float(jnp.mean(jnp.argmax(network(w, x), axis=1) == y))


# %%
# A loop of one's own
# -------------------
#
# Every step has another mini-batch, so every step is another problem, and the loop is ours: ask the
# solver for points, have the problem evaluate them, tell the solver. All particles of a step see
# the same batch, since only differences between them count.

solver = ConsensusHopping(particles=PARTICLES, spread=0.1)
key = jax.random.key(1)
state = solver.init(tolerax.Start(weights, None, None, key, lambda query: None))


@jax.jit
def advance(state, key):
    def step(i, state):
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, train_y.size)
        problem = tolerax.Objective(lambda w: loss(w, train_x[rows], train_y[rows]))
        query = solver.ask(state)
        return solver.tell(state, query, problem.evaluate(query))

    return jax.lax.fori_loop(0, STEPS, step, state)


trained = weights
seen = [(accuracy(trained, train_x, train_y), accuracy(trained, test_x, test_y))]
for r in range(ROUNDS):
    state = advance(state, jax.random.fold_in(key, r))
    trained = state.box.unravel(state.x)
    seen.append((accuracy(trained, train_x, train_y), accuracy(trained, test_x, test_y)))

images_seen = ROUNDS * STEPS * PARTICLES * BATCH
print(f"consensus hopping: train {seen[-1][0]:.3f}, test {seen[-1][1]:.3f}")
print(f"  forward passes of one image: {images_seen:,}, backward passes: 0")

# %%
# Beside gradients
# ----------------
#
# The same network and number of mini-batches by stochastic gradient descent (step 0.5, falling to
# 0). A backward pass costs about two forward ones: with gradients the same accuracy is far cheaper.
# Values alone are for what has no gradient: a quantized network, a simulator in the loss, a network
# behind an interface.


@jax.jit
def descend(w, key):
    def step(i, w):
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, train_y.size)
        g = jax.grad(loss)(w, train_x[rows], train_y[rows])
        rate = 0.5 * (1 - i / (ROUNDS * STEPS))
        return jax.tree.map(lambda leaf, slope: leaf - rate * slope, w, g)

    return jax.lax.fori_loop(0, ROUNDS * STEPS, step, w)


by_gradient = descend(weights, key)
print(
    f"gradient descent: train {accuracy(by_gradient, train_x, train_y):.3f}, "
    f"test {accuracy(by_gradient, test_x, test_y):.3f}"
)
print(f"  forward and backward passes of one image: {ROUNDS * STEPS * BATCH:,} each")

figure, ax = plt.subplots(figsize=(6, 4))
steps = STEPS * np.arange(ROUNDS + 1)
for column, name in enumerate(("training", "test")):
    ax.plot(steps, [row[column] for row in seen], label=f"consensus hopping, {name}")
ax.axhline(
    accuracy(by_gradient, test_x, test_y), color="gray", linestyle=":", label="gradients, test"
)
ax.set_xlabel("steps of 100 particles")
ax.set_ylabel("share of digits recognized")
ax.set_ylim(0.8, 1.005)
ax.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %%
# What it gets wrong
# ------------------
#
# Test digits with their labels, and what the network says.

said = np.asarray(jnp.argmax(network(trained, test_x), axis=1))
wrong = np.flatnonzero(said != np.asarray(test_y))[:8]
figure, axes = plt.subplots(1, 8, figsize=(9, 1.7))
for ax in axes:
    ax.set_axis_off()
for ax, i in zip(axes, wrong, strict=False):
    ax.imshow(test_x[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"{test_y[i]}, says {said[i]}", fontsize=9)
figure.tight_layout()
plt.show()
