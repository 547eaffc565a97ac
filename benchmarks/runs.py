"""Runs of the library as lists of what they evaluated, and what a loss cost them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

import tolerax
from benchmarks.reference import both_levels, tight_loss


class Told(NamedTuple):
    """One answer: total cost after it, where, what was claimed, the lower-level solution (flat),
    and the best point known after it."""

    cost: int
    x: PyTree
    value: float
    value_error: float
    gradient: PyTree
    gradient_error: float
    y: Float[Array, " m"]
    best_x: PyTree


def cost_of(work: tolerax.Work) -> int:
    """Lower-level gradients plus Hessian products: the cost unit of every bilevel figure."""
    return int(work.lower_gradients) + int(work.hessian_products)


def record(
    problem: tolerax.Bilevel, solver: tolerax.Solver, x0: PyTree, cost: int, **options: Any
) -> list[Told]:
    """Every answer of a run that ends by itself or once its cost is spent."""
    answers: list[Told] = []

    def remember(step: Any) -> None:
        told, spent = step.evaluation, cost_of(step.run.work)
        answers.append(
            Told(
                spent,
                step.query.x,
                float(told.value),
                float(told.value_error),
                told.gradient,
                float(told.gradient_error),
                told.carry.y,
                step.run.best.x,
            )
        )
        if spent >= cost:
            raise StopIteration

    options = {"max_steps": 100_000} | options
    tolerax.solve(problem, solver, x0, callback=remember, **options)
    return answers


class Loss:
    """True upper loss of points of one problem; solves start from the last solution, and the same
    point is solved once."""

    def __init__(self, problem: tolerax.Bilevel):
        self.upper, self.lower = both_levels(problem)
        self.y = problem.oracle.y0
        self.known: dict[bytes, tuple[float, PyTree]] = {}

    def _solved(self, x: PyTree) -> tuple[float, PyTree]:
        key = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x))
        if key not in self.known:
            self.known[key] = tight_loss(self.upper, self.lower, x, self.y)
            self.y = self.known[key][1]
        return self.known[key]

    def __call__(self, x: PyTree) -> float:
        return self._solved(x)[0]

    def solution(self, x: PyTree) -> PyTree:
        """The lower-level solution at x."""
        return self._solved(x)[1]


def first_below(
    costs: Sequence[int], points: Sequence[PyTree], loss: Callable[[PyTree], float], target: float
) -> int | None:
    """The cost at the first of a sequence of non-increasing losses that is at most `target`, by
    bisection; `None` when the last is not."""
    if not points or not loss(points[-1]) <= target:
        return None
    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        if loss(points[middle]) <= target:
            high = middle
        else:
            low = middle + 1
    return costs[high]
