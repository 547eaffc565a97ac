"""What evolves in a search along descent directions, and what its parts hand to one another."""

from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy
from tolerax.solvers._common import Box, Geometry

INCUMBENT, TRIAL, AHEAD, BEHIND = range(4)


class Incumbent(eqx.Module):
    """The current point and what is known there."""

    x: Float[Array, " n"]
    f: Float[Array, ""]
    f_error: Float[Array, ""]
    z: Float[Array, " n"]
    z_error: Float[Array, ""]
    parts: Accuracy
    achieved: Accuracy
    carry: PyTree


class SearchState(eqx.Module):
    """What evolves: the incumbent, what directions are made from, the search along `p`, the
    request."""

    now: Incumbent
    model: PyTree
    p: Float[Array, " n"]
    step: Float[Array, ""]
    trials: Int[Array, ""]
    restarted: Bool[Array, ""]
    mode: Int[Array, ""]
    request: Accuracy
    trial_carry: PyTree
    ahead: Float[Array, ""]
    refinements: Int[Array, ""]
    iterations: Int[Array, ""]
    dearest: Int[Array, ""]
    scale: Float[Array, ""]
    f_scale: Float[Array, ""]
    decrease: Float[Array, ""]
    box: Box
    done: Bool[Array, ""]
    status: Any


class Answer(NamedTuple):
    """What an answer says beside values: its outcome, which success it would support, and the
    geometry and the Hessian of the problem."""

    failed: Bool[Array, ""]
    status: Any
    converged: Any
    geometry: Geometry
    hessian: Any


class Todo(NamedTuple):
    """What is left to do after an answer: plan a direction; end if that finds none (`hopeless`); go
    on the same way by the factor `stretch` unless that is 0."""

    plan: Bool[Array, ""]
    hopeless: Bool[Array, ""]
    stretch: Float[Array, ""]


class Direction(NamedTuple):
    """A direction `-h`: whether it knows of curvature (a `fresh` one does not, and has its length
    from `first_step`), the gradient that is to be expected after the step, and the model."""

    h: Float[Array, " n"]
    fresh: Bool[Array, ""]
    ready: Bool[Array, ""]
    expected: Float[Array, ""]
    model: PyTree
