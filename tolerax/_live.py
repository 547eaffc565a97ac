"""Progress from inside compiled loops: `jax.lax.while_loop` under `jit`, `vmap` and `grad`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, ArrayLike, Int

from tolerax.progress import Progress, Scalars, Silent, resolve


class Begun:
    """Progress of a compiled loop that does not know when it is called: a run begins with its first
    report."""

    def __init__(self, target: Progress, total: int, description: str):
        self.target, self.total, self.description = target, total, description
        self._is_open = False

    def start(self, total: int | None, description: str) -> None:
        """Nothing: the first update starts."""

    def update(self, step: int, **scalars: float) -> None:
        """Start if this is the first, then report."""
        if not self._is_open:
            self._is_open = True
            self.target.start(self.total, self.description)
        self.target.update(step, **scalars)

    def close(self, message: str) -> None:
        """The next update begins another run."""
        self._is_open = False
        self.target.close(message)


def report_from_compiled(
    progress: Any, every: int, step: Int[ArrayLike, ""], scalars: Scalars
) -> None:
    """Tell `progress` from a compiled loop, when `step` is a multiple of `every`.

    For the body of a `jax.lax.while_loop` or `jax.lax.scan`, under `jit`, `vmap` and `grad`. It has
    no effect on results. Under `vmap` one lane is reported: the one with the most steps behind it,
    which is the first of those still running. Call `close_from_compiled` after the loop, or the
    last steps may not be shown.

    - `progress`: anything that [`resolve`][] takes; it becomes part of the compiled function.
    - `every`: at least 1. Each report costs a round trip to the host, so make this large where
      steps are short; a bar is throttled by time as well.
    - `step`, `scalars`: integer, and named real scalars.

    >>> import jax
    >>> seen = []
    >>> def halve(x):
    ...     def body(carry):
    ...         step, x = carry[0] + 1, carry[1] / 2
    ...         report_from_compiled(lambda step, x: seen.append((step, x)), 2, step, {"x": x})
    ...         return step, x
    ...
    ...     return jax.lax.while_loop(lambda carry: carry[1] > 1, body, (0, x))[1]
    >>> jax.jit(halve)(16.0).item()
    1.0
    >>> jax.effects_barrier()  # reports arrive at some time; this waits for them
    >>> seen
    [(2, 4.0), (4, 1.0)]
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")
    target = resolve(progress)
    if isinstance(target, Silent):
        return
    step, scalars = _one_lane(step, scalars)

    def update(step: Any, scalars: dict[str, Any]) -> None:
        target.update(step, **scalars)

    jax.lax.cond(
        step % every == 0,
        # Unordered: ordered callbacks do not work under vmap.
        lambda: jax.debug.callback(update, step, scalars),
        lambda: None,
    )


def close_from_compiled(
    progress: Any, step: Int[ArrayLike, ""], scalars: Scalars, message: str = ""
) -> None:
    """Tell `progress` of the last step and close it, after a compiled loop.

    `step` and `scalars` must come out of the loop: that is what makes this call run after it.
    """
    target = resolve(progress)
    if isinstance(target, Silent):
        return

    def close(step: Any, scalars: dict[str, Any]) -> None:
        target.update(step, **scalars)
        target.close(message)

    jax.debug.callback(close, *_one_lane(step, scalars))


def _one_lane(
    step: Int[ArrayLike, ""], scalars: Scalars
) -> tuple[Int[Array, ""], dict[str, Array]]:
    """Checked scalars without a batch axis, whatever `vmap` is around."""
    arrays = {name: jnp.asarray(value) for name, value in scalars.items()}
    for name, value in arrays.items():
        if name == "step":
            raise ValueError('a reported scalar cannot be called "step": rename it.')
        is_real = jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool
        if value.ndim or not is_real or jnp.iscomplexobj(value):
            raise ValueError(
                f"{name} is {value.dtype} of shape {value.shape}: only real scalars are reported."
            )
    # Reports carry no derivatives.
    return _slowest(jnp.asarray(step), jax.lax.stop_gradient(arrays))


# A batched predicate would turn `cond` into `select`, which runs the callback in every step and
# lane. Under vmap this takes one lane of predicate and scalars, so that they have no batch axis.
@custom_vmap
def _slowest(step: Array, scalars: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    return step, scalars


@_slowest.def_vmap
def _slowest_of_batch(
    size: int, is_batched: Any, step: Array, scalars: dict[str, Array]
) -> tuple[Any, Any]:
    def batched(value: Array, has_axis: bool) -> Array:
        return value if has_axis else jnp.broadcast_to(value, (size, *value.shape))

    steps = batched(step, is_batched[0])
    lanes = jax.tree.map(batched, scalars, is_batched[1])
    # Lanes run in step, and a lane that is done keeps its number: the largest one is running.
    lane = jnp.argmax(steps)
    out = _slowest(steps[lane], {name: values[lane] for name, values in lanes.items()})
    return out, jax.tree.map(lambda _: False, out)
