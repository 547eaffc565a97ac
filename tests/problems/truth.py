"""Small problems of every kind, and their exact values and gradients by dense algebra."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import tolerax
from tests.problems.library.dense import Dense
from tolerax.contracts import Accuracy, Query
from tolerax.problems import CrossBounds, library
from tolerax.problems.constants import proved
from tolerax.problems.library.base import LibraryProblem, assemble
from tolerax.problems.library.cleaning import CleaningCross, WeightedLoss
from tolerax.problems.library.digits import Samples, ValidationLoss
from tolerax.problems.library.penalties import PenalizedLoss, penalties, penalty_cross
from tolerax.status import PointStatus


def samples(rng, count, features=5, classes=3):
    a = rng.uniform(size=(count, features))
    labels = np.argmax(a[:, :classes] + 0.3 * rng.normal(size=(count, classes)), axis=1)
    return Samples(jnp.asarray(a), jnp.asarray(np.eye(classes)[labels]))


def small_penalties(seed=0, **options):
    """P1 on 40 samples of 5 features and 3 classes."""
    rng = np.random.default_rng(seed)
    train, validation = samples(rng, 40), samples(rng, 25)
    levels = assemble(
        ValidationLoss(validation),
        PenalizedLoss(train),
        jnp.zeros((5, 3)),
        options,
        strong_convexity=proved(penalties, because="the loss is convex"),
        self_concordance=proved(train.self_concordance(), because="third cumulants"),
        upper_smoothness=proved(validation.smoothness(), because="singular values"),
        cross=proved(penalty_cross, because="F_x is diagonal"),
    )
    return LibraryProblem(**levels, x0=jnp.full((5, 3), -3.0), description="small P1")


def small_cleaning(seed=0, **options):
    """P4 on 20 samples of 5 features and 3 classes."""
    rng = np.random.default_rng(seed)
    train, validation = samples(rng, 20), samples(rng, 25)
    ridge = jnp.asarray(0.05)
    levels = assemble(
        ValidationLoss(validation),
        WeightedLoss(train, ridge),
        jnp.zeros((5, 3)),
        options,
        strong_convexity=proved(ridge, because="the losses are convex"),
        self_concordance=proved(train.self_concordance(), because="third cumulants"),
        upper_smoothness=proved(validation.smoothness(), because="singular values"),
        cross=proved(CleaningCross(train, ridge), because="variances"),
    )
    return LibraryProblem(**levels, x0=jnp.zeros(20), description="small P4")


MAKE = {
    "quadratic": lambda **options: library.quadratic(n=40, d=5, **options),
    "penalties": small_penalties,
    "recycled": lambda **options: small_penalties(**({"recycle": 4} | options)),
    "variation": lambda **options: library.tv_denoising(size=8, pictures=1, **options),
    "experts": lambda **options: library.field_of_experts(
        size=8, pictures=1, filters=2, width=3, **options
    ),
    "cleaning": small_cleaning,
}


class Truth(NamedTuple):
    """The solution, the adjoint, the value and the gradient at a flat x."""

    y: np.ndarray
    q: np.ndarray
    value: float
    gradient: np.ndarray


class Exact(Dense):
    """A problem with its exact oracle on flat vectors."""

    def __init__(self, problem):
        super().__init__(problem)
        self.lower = jax.jit(lambda y, x: problem.lower(self.y_of(y), self.x_of(x)))
        self.upper = jax.jit(lambda y, x: problem.upper(self.y_of(y), self.x_of(x)))

        def total(y, q, x):
            direct = jax.grad(lambda x: problem.upper(self.y_of(y), self.x_of(x)))(x)
            return direct - jax.vjp(lambda x: self.gradient(y, x), x)[1](q)[0]

        self.total = jax.jit(total)
        claims = problem.constants["cross"].value
        self.claims = jax.jit(lambda y, q, x: claims(self.y_of(y), self.y_of(q), self.x_of(x)))

    def at(self, x) -> Truth:
        y = self.minimizer(x)
        q = np.linalg.solve(self.hessian(y, x), self.upper_gradient(y, x))
        # The correction leaves the value an error of second order in what is left of y's error.
        value = float(self.upper(y, x) - q @ np.asarray(self.gradient(y, x)))
        return Truth(y, q, value, np.asarray(self.total(y, q, x)))

    def minimizer(self, x):
        """Newton's method with dense Hessians until rounding stops it."""
        y, f = self.y0, float(self.lower(self.y0, x))
        for _ in range(300):
            r = np.asarray(self.gradient(y, x))
            step = np.linalg.solve(self.hessian(y, x), r)
            if np.linalg.norm(step) <= 1e-14 * (1 + np.linalg.norm(y)):
                return y
            size = 1.0
            while size > 1e-12:
                new = float(self.lower(y - size * step, x))
                if new <= f - 1e-4 * size * (r @ step) + 1e-13 * abs(f):
                    break
                size *= 0.5
            y, f = y - size * step, new
            if size == 1 and np.linalg.norm(step) <= 1e-12 * (1 + np.linalg.norm(y)):
                return y
        raise AssertionError("no lower-level solution")


@functools.cache
def exact(name: str) -> Exact:
    return Exact(MAKE[name]())


def some_x(name, rng):
    """Hyperparameters as a solver meets them."""
    x0 = exact(name).x0
    if name in ("penalties", "recycled"):
        return rng.choice([-2.0, -5.0]) + 1.5 * rng.normal(size=x0.shape)
    if name == "variation":
        return np.array([rng.uniform(-6, 0), rng.uniform(-4, 0)])
    if name == "experts":
        x = dict(exact(name).x_of(jnp.asarray(x0)))
        x["filters"] = x["filters"] + 0.3 * rng.normal(size=x["filters"].shape)
        x["log_weight"] = jnp.asarray(rng.uniform(-5, -1))
        x["log_weights"] = jnp.asarray(rng.normal(size=2))
        x["log_smoothings"] = jnp.asarray(rng.uniform(-3, 0, size=2))
        return np.asarray(ravel_pytree(x)[0])
    return x0 + rng.normal(size=x0.shape)


evaluate = eqx.filter_jit(lambda problem, query: problem.evaluate(query))


def ask(problem, x, state, adjoint, carry=None, **more):
    """The answer at x (a pytree)."""
    carry = problem.cold_start() if carry is None else carry
    return evaluate(problem, Query(x, Accuracy(state, adjoint), carry, **more))


def outcome(status):
    names = ("ok", "inaccurate", "floor", "failed", "contradicted")
    return next(n for n in names if bool(status == getattr(PointStatus, n)))


def errors(evaluation, truth):
    """The true errors of value and gradient."""
    gradient = np.asarray(ravel_pytree(evaluation.gradient)[0])
    return abs(float(evaluation.value) - truth.value), np.linalg.norm(gradient - truth.gradient)


def ridge(**constants):
    """`y = 2 / (1 + exp(x))` in all three entries: the upper level is 0 at x = 0."""

    def cross(y, q, x):
        root = jnp.exp(0.5 * x)
        return CrossBounds(root * jnp.linalg.norm(y), root * jnp.linalg.norm(q), 1.0)

    return tolerax.Bilevel(
        lambda y, x: jnp.sum((y - 1) ** 2),
        lambda y, x: 0.5 * jnp.sum((y - 2) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(y**2),
        jnp.zeros(3),
        **{"strong_convexity": jnp.exp, "self_concordance": 0.0, "cross": cross} | constants,
    )
