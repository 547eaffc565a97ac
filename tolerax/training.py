"""Training of layers that solve within: tolerances follow the gradient, and runs resume."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.checkpoint import Checkpoint, fingerprint
from tolerax.problems.hard_constrained import Field, HardConstrained, WarmStart
from tolerax.problems.implicit import BackwardReport
from tolerax.progress import resolve
from tolerax.status import PointStatus, is_failed
from tolerax.validation import is_concrete, traced_floats

logger = logging.getLogger("tolerax")


class Forcing(eqx.Module):
    """The tolerance of the inner solves, tied to the gradient of the loss: as accurate as it is
    worth.

    Step t solves to `first * (|g| / |g at the beginning|) ** power`, at least `floor` and at most
    `first`, with |g| averaged over about ten steps. `Forcing.fixed(tolerance)` never changes.
    """

    first: Any = 1e-1
    power: Any = 1.0
    floor: Any = 1e-8

    def __check_init__(self):
        if is_concrete((self.floor, self.first)) and not 0 < self.floor <= self.first:
            raise ValueError(
                f"floor is {self.floor} and first is {self.first}: give 0 < floor <= first."
            )

    @classmethod
    def fixed(cls, tolerance: float) -> "Forcing":
        """Always the same tolerance."""
        return cls(tolerance, 0.0, tolerance)

    def __call__(self, size: Array, begun: Array) -> Array:
        """The tolerance where the gradient was `begun` and is `size`."""
        ratio = size / jnp.where(begun > 0, begun, 1)
        return jnp.clip(self.first * ratio**self.power, self.floor, self.first)


class TrainingState(eqx.Module):
    """All that evolves: what a checkpoint holds.

    - `network`, `optimizer`: weights, and the state of the optimizer. - `warm`: coefficients and
      trust regions of every sample and expert. - `step`, `size`, `begun`: how many steps are done,
      the size of the gradient (averaged) and what it was at the beginning.
    - `loss`, `gradient`, `tolerance`, `evaluations`, `failed`, `inaccurate`, `skipped`: of each
      step; evaluations of residuals within, lanes that failed, forward or backward, or belong to a
      sample that was left out, lanes that did not reach the tolerance, and whether the step was
      left out since its gradient was no number. - `steps`: for how many there is room.
    """

    network: Any
    optimizer: Any
    warm: WarmStart
    step: Int[Array, ""]
    size: Float[Array, ""]
    begun: Float[Array, ""]
    loss: Float[Array, " steps"]
    gradient: Float[Array, " steps"]
    tolerance: Float[Array, " steps"]
    evaluations: Int[Array, " steps"]
    failed: Int[Array, " steps"]
    inaccurate: Int[Array, " steps"]
    skipped: Int[Array, " steps"]
    steps: int = eqx.field(static=True)


HISTORIES = ("loss", "gradient", "tolerance", "evaluations", "failed", "inaccurate", "skipped")


class Trained(eqx.Module):
    """What training returns: the `layer` with its trained network, and the last `state`, with
    histories as long as the steps that were done."""

    layer: HardConstrained
    state: TrainingState


def residual_loss(field: Field, inputs: PyTree) -> Float[Array, " samples"]:
    """The mean square of the equation's residual over the grid, for each sample: nothing but the
    equation is needed."""
    del inputs
    return jnp.mean(field.residual.reshape(len(field.residual), -1) ** 2, axis=1)


def train(
    layer: HardConstrained,
    inputs: PyTree,
    optimizer: Any,
    *,
    steps: int,
    batch: int,
    key: PRNGKeyArray,
    loss: Callable[[Field, PyTree], Any] = residual_loss,
    forcing: Forcing | None = None,
    warm_starts: bool = True,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    progress: Any = None,
    callback: Callable[[TrainingState], Any] | None = None,
) -> Trained:
    """Train the network of a layer by a stochastic gradient method.

    - `inputs`: pytree of the samples, with a leading axis. Each epoch goes through them once in a
      new order, `batch` at a time.
    - `optimizer`: with `init(weights)` and `update(gradient, state, weights)`, as those of optax.
    - `loss(field, inputs)`: one number for each sample of a batch.
    - `forcing`: tolerances of the inner solves; [`Forcing`][] by default.
    - `warm_starts`: whether a sample starts from its coefficients of the last time, and the first
      time from the mean of those of other samples.
    - `key`: draws batches and collocation points, which change from step to step.
    - `checkpoint`: a path or `Checkpoint`: where the run is saved; if there is something it goes on
      from there, and arrives at the same bits as one that was never interrupted. One of another
      training is refused: every argument must be the same, `steps` too, but for `progress` and
      `callback`. To train on as long as it pays, give many steps and end by the callback.
    - `progress`: as of [`solve`][]. - `callback(state)`: after each step; `StopIteration` ends the
      run.

    Samples that are not finite, or whose loss is not, are left out of a step, and their lanes count
    in `failed` with those that fail on their own; a step whose gradient is not finite all the same
    is left out and `skipped` says so. Lanes that end before the tolerance is reached count in
    `inaccurate`, and the first of them is logged: derivatives are those of where they ended.

    >>> import equinox as eqx, jax, jax.numpy as jnp, optax, tolerax
    >>> x = jnp.linspace(0, 1, 17)
    >>> class Powers(eqx.Module):
    ...     rate: jax.Array
    ...
    ...     def __call__(self, a):
    ...         return jnp.stack([x * jnp.exp(-self.rate * x), x**2])
    >>> equation = tolerax.Equation(  # u' = -a u, u(0) = 1
    ...     lambda u: jnp.stack([u, jnp.gradient(u, x[1])]),
    ...     lambda z, a: z[1] + a * z[0],
    ...     data=lambda a: a,
    ...     lift=lambda a: jnp.ones(17),
    ... )
    >>> layer = tolerax.HardConstrained(
    ...     Powers(jnp.array(6.0)), equation, tolerax.Boxes((17,), (1,))
    ... )
    >>> rates = jnp.linspace(0.5, 1.5, 8)
    >>> options = {"steps": 30, "batch": 4, "key": jax.random.key(0)}
    >>> trained = tolerax.train(layer, rates, optax.adam(0.2), **options)
    >>> int(trained.state.step), bool(trained.layer.network.rate < 6)
    (30, True)
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    if steps < 1 or not 1 <= batch <= count:
        raise ValueError(
            f"steps is {steps} and batch is {batch}: give at least one step, and batches of 1 to "
            f"{count} samples."
        )
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = Checkpoint(checkpoint)
    traced: Any = traced_floats(Forcing() if forcing is None else forcing)
    state = _first(layer, inputs, optimizer, steps, count)
    meter = resolve(progress)
    meter.start(steps, type(layer.network).__name__)
    saved, saved_step, message = time.monotonic(), -1, "stopped"
    fixed = eqx.tree_at(lambda layer: layer.network, layer, None, is_leaf=lambda leaf: leaf is None)
    static = eqx.filter(layer.network, eqx.is_inexact_array, inverse=True)
    frozen = (fixed, static)
    # What a run that goes on must have in common with the one that was saved.
    told = (layer, optimizer, inputs, loss, traced, batch, warm_starts, key)
    same = {"training": fingerprint(told)}
    if checkpoint is not None and checkpoint.exists():
        state, _ = checkpoint.load(state, expect=same)
    try:
        while (step := int(state.step)) < steps:
            state = _step(state, frozen, inputs, key, traced, optimizer, loss, batch, warm_starts)
            shown = ("gradient", "tolerance", "failed", "inaccurate")
            last = {name: float(getattr(state, name)[step]) for name in shown}
            meter.update(step + 1, value=float(state.loss[step]), **last)
            if int(state.skipped[step]):
                logger.warning("step %d is left out: its gradient is not finite.", step)
            if last["inaccurate"] and not np.any(state.inaccurate[:step]):
                logger.warning(
                    "step %d: %d lanes did not reach the tolerance %.1e: give the solver more "
                    "max_steps, or the layer a larger ridge; later ones are counted only.",
                    *(step, last["inaccurate"], last["tolerance"]),
                )
            if checkpoint is not None:
                late = time.monotonic() - saved > checkpoint.every_seconds
                due = checkpoint.every_steps and (step + 1) % checkpoint.every_steps == 0
                if late or due or step + 1 == steps:
                    checkpoint.save(state, same)
                    saved, saved_step = time.monotonic(), step + 1
            if callback is not None:
                callback(state)
        message = "done"
    except StopIteration:
        message = "stopped by the callback"
        if checkpoint is not None and saved_step < int(state.step):
            checkpoint.save(state, same)
    finally:
        meter.close(message)
    done = int(state.step)
    cut = dataclasses.replace(state, **{name: getattr(state, name)[:done] for name in HISTORIES})
    network = eqx.combine(state.network, static)
    return Trained(eqx.tree_at(lambda layer: layer.network, layer, network), cut)


def _first(
    layer: HardConstrained, inputs: PyTree, optimizer: Any, steps: int, count: int
) -> TrainingState:
    weights = eqx.filter(layer.network, eqx.is_inexact_array)
    zeros, whole = jnp.zeros(steps), jnp.zeros(steps, jnp.int32)
    nothing = jnp.zeros(())
    state = TrainingState(
        network=weights,
        optimizer=optimizer.init(weights),
        warm=layer.cold_start(count, inputs),
        step=jnp.array(0, jnp.int32),
        size=nothing,
        begun=nothing,
        loss=zeros,
        gradient=zeros,
        tolerance=zeros,
        evaluations=whole,
        failed=whole,
        inaccurate=whole,
        skipped=whole,
        steps=steps,
    )
    # A step returns strong types: weak ones would make it compile again.
    strong = lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype)  # noqa: E731
    arrays, rest = eqx.partition(state, eqx.is_array)
    return eqx.combine(jax.tree.map(strong, arrays), rest)


def _finite(inputs: PyTree, count: int) -> Bool[Array, " samples"]:
    """Which samples are."""
    leaves = [leaf for leaf in jax.tree.leaves(inputs) if eqx.is_inexact_array(leaf)]
    each = [jnp.all(jnp.isfinite(leaf).reshape(count, -1), axis=1) for leaf in leaves]
    return jnp.all(jnp.stack([jnp.ones(count, bool), *each]), axis=0)


class _Answer(eqx.Module):
    """Of one batch: mean loss and its gradient, what became of the lanes, the samples that were
    `asked` for and those among them that `count`."""

    loss: Float[Array, ""]
    slope: PyTree
    norm: Float[Array, ""]
    report: BackwardReport
    warm: WarmStart
    lanes: Any
    asked: Bool[Array, " batch"]
    count: Bool[Array, " batch"]


@eqx.filter_jit
def _step(
    state: TrainingState,
    frozen: tuple,
    inputs: PyTree,
    key: PRNGKeyArray,
    forcing: Forcing,
    optimizer: Any,
    loss: Callable,
    batch: int,
    warm_starts: bool,
) -> TrainingState:
    layer, static = frozen
    count, t = state.warm.w.shape[0], state.step
    per_epoch = math.ceil(count / batch)
    order = jax.random.permutation(jax.random.fold_in(key, t // per_epoch), count)
    # The last batch of an epoch is filled up with the first samples of its order.
    own = order[(t % per_epoch * batch + jnp.arange(batch)) % count]
    finite = _finite(jax.tree.map(lambda leaf: leaf[own], inputs), batch)
    started = state.begun > 0
    tolerance = jnp.where(started, forcing(state.size, state.begun), forcing.first)
    blank = BackwardReport.blank(batch * state.warm.w.shape[1])

    def answer(asked: Bool[Array, " batch"]) -> _Answer:
        # A weight of 0 does not keep what is not finite out of a gradient: such a sample gives its
        # place to another one.
        taken = jnp.where(asked, own, own[jnp.argmax(asked)])
        some = jax.tree.map(lambda leaf: leaf[taken], inputs)
        warm = None
        if warm_starts:
            # Samples that were not solved yet start from the mean of those that were.
            w = state.warm.w
            solved = jnp.any(w != 0, axis=(1, 2))
            mean = jnp.sum(w, axis=0) / jnp.maximum(jnp.sum(solved), 1)
            start = jnp.where(solved[taken][:, None, None], w[taken], mean[None])
            warm = WarmStart(start, state.warm.radius[taken])

        def value(weights: PyTree, report: BackwardReport) -> tuple[Array, tuple]:
            now = eqx.tree_at(
                lambda layer: layer.network,
                layer,
                eqx.combine(weights, static),
                is_leaf=lambda leaf: leaf is None,
            )
            field = now(
                some,
                key=jax.random.fold_in(key, count + t),
                tolerance=tolerance,
                warm=warm,
                report=report,
            )
            each = loss(field, some)
            if jnp.shape(each) != (batch,):
                raise ValueError(
                    f"loss returned shape {jnp.shape(each)}: give one number for each of the "
                    f"{batch} samples."
                )
            counts = asked & jnp.isfinite(each)
            mean = jnp.sum(jnp.where(counts, each, 0)) / jnp.maximum(jnp.sum(counts), 1)
            return mean, (field.warm, field.lanes, counts)

        run = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        (mean, (warm, lanes, counts)), (slope, report) = run(state.network, blank)
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slope)]
        norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
        return _Answer(mean, slope, norm, report, warm, lanes, asked, counts)

    def unsettled(now: _Answer) -> Bool[Array, ""]:
        fewer = jnp.any(now.count != now.asked)
        return ~jnp.isfinite(now.norm) & fewer & jnp.any(now.count)

    # Before the first: no number, and nobody asked.
    like = jax.eval_shape(answer, finite)
    now = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    nan = jnp.full((), jnp.nan)
    begin = dataclasses.replace(
        now, loss=nan.astype(like.loss.dtype), norm=nan.astype(like.norm.dtype), count=finite
    )
    now = jax.lax.while_loop(unsettled, lambda now: answer(now.count), begin)
    slope, norm, lanes = now.slope, now.norm, now.lanes
    fine = jnp.isfinite(norm)
    moves, optimizer_state = optimizer.update(slope, state.optimizer, state.network)
    moved = jax.tree.map(lambda w, m: w + m.astype(w.dtype), state.network, moves)
    chosen = lambda new, old: jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)  # noqa: E731
    kept = jnp.repeat(now.count, state.warm.w.shape[1])
    failed = is_failed(lanes.status) | (now.report.failed > 0) | ~kept
    inaccurate = kept & (lanes.status == PointStatus.inaccurate)
    size = jnp.where(started, 0.9 * state.size + 0.1 * norm, norm)
    size = jnp.where(fine, size, state.size)
    put = lambda row, entry: row.at[t].set(jnp.asarray(entry, row.dtype))  # noqa: E731

    def stored(old: Array, new: Array) -> Array:
        own_samples = now.count.reshape(-1, *[1] * (new.ndim - 1))
        return old.at[own].set(jnp.where(own_samples, new, old[own]))

    return TrainingState(
        network=chosen(moved, state.network),
        optimizer=chosen(optimizer_state, state.optimizer),
        warm=jax.tree.map(stored, state.warm, now.warm),
        step=t + 1,
        size=size,
        begun=jnp.where(started, state.begun, size),
        loss=put(state.loss, now.loss),
        gradient=put(state.gradient, norm),
        tolerance=put(state.tolerance, tolerance),
        evaluations=put(state.evaluations, jnp.sum(lanes.evaluations)),
        failed=put(state.failed, jnp.sum(failed)),
        inaccurate=put(state.inaccurate, jnp.sum(inaccurate)),
        skipped=put(state.skipped, ~fine),
        steps=state.steps,
    )
