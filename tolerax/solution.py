"""What a run returns: the best point, how far it can be trusted, what it cost, how it went."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from tolerax.contracts import Evaluation, Provenance, Query, Work
from tolerax.status import Status, is_success


class Best(eqx.Module):
    """The best point seen: lowest upper end `value + value_error` among the feasible ones."""

    x: PyTree
    value: Float[Array, ""]
    value_error: Float[Array, ""]
    gradient: PyTree
    gradient_norm: Float[Array, ""]
    gradient_error: Float[Array, ""]
    violation: Float[Array, ""]
    carry: PyTree


class History(eqx.Module):
    """One row for each answer, in buffers of fixed size (no callback is needed to plot a run).

    Runs longer than the buffers keep every `stride`-th row. `solver` holds the scalars that the
    solver names in `record`. Use `rows()` for the filled part as NumPy arrays.
    """

    value: Float[Array, "*rows"]
    value_error: Float[Array, "*rows"]
    best_value: Float[Array, "*rows"]
    gradient_norm: Float[Array, "*rows"]
    gradient_error: Float[Array, "*rows"]
    state_tolerance: Float[Array, "*rows"]
    adjoint_tolerance: Float[Array, "*rows"]
    state_error: Float[Array, "*rows"]
    adjoint_error: Float[Array, "*rows"]
    work: Work
    solver: dict[str, Array]
    count: Any  # None in a row that is to be added
    stride: int = eqx.field(static=True)

    def columns(self) -> "History":
        """The buffers alone."""
        return eqx.filter(self, lambda leaf: eqx.is_array(leaf) and leaf.ndim == 1)

    def add(self, row: "History") -> "History":
        """One more row: a history whose columns are scalars, without a count."""
        index = row_index(self.count, self.stride, self.value.shape[0])
        put = lambda column, entry: column.at[index].set(entry, mode="drop")  # noqa: E731
        columns = jax.tree.map(put, self.columns(), row)
        return eqx.combine(columns, eqx.tree_at(lambda h: h.count, self, self.count + 1))

    def rows(self) -> dict[str, np.ndarray]:
        """The recorded rows by column name; work counts appear under their own names."""
        n = min(-(-int(self.count) // self.stride), self.value.shape[0])
        columns = {k: v for k, v in vars(self).items() if k not in ("work", "solver", "stride")}
        columns.pop("count")
        columns |= vars(self.work) | self.solver
        return {name: np.asarray(column)[:n] for name, column in columns.items()}


class Run(eqx.Module):
    """Everything that evolves in a run: what a checkpoint holds and what `solve` continues from."""

    solver_state: Any
    best: Best
    scale: Float[Array, ""]  # size of the first value there was
    work: Work
    history: Any  # a History; in the compiled loop, the same as a Table
    step: Int[Array, ""]
    failures: Int[Array, ""]
    status: Any
    verifying: Any
    claim: Any
    bounds: tuple[PyTree, PyTree] | None


class Step(eqx.Module):
    """What a callback sees after each answer."""

    query: Query
    evaluation: Evaluation
    run: Run

    @property
    def number(self) -> int:
        """How many answers there have been."""
        return int(self.run.step)

    @property
    def x(self) -> PyTree:
        """The best point so far."""
        return self.run.best.x

    @property
    def value(self) -> float:
        """The value at the best point so far."""
        return float(self.run.best.value)


class Solution(eqx.Module):
    """The result of `solve`.

    `x` is the best point seen and the truth lies in `interval`, provided that `provenance` holds no
    estimate; `gradient_error` bounds the Euclidean error of `gradient`. `gradient_norm` is its norm
    without the entries that push against a bound (`None` and `inf` for solvers that ask for no
    gradients). `state` continues the run when passed to `solve` as start.
    """

    x: PyTree
    value: Float[Array, "*batch"]
    value_error: Float[Array, "*batch"]
    gradient: PyTree
    gradient_norm: Float[Array, "*batch"]
    gradient_error: Float[Array, "*batch"]
    violation: Float[Array, "*batch"]
    status: Any
    work: Work
    history: History
    state: Run
    carry: PyTree
    provenance: Provenance

    @property
    def interval(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Lower and upper end of the true value at `x`."""
        return self.value - self.value_error, self.value + self.value_error

    @property
    def steps(self) -> Int[Array, "*batch"]:
        """How many answers the solver was told."""
        return self.state.step

    @property
    def success(self) -> Array:
        """Whether the stopping criterion was reached and held when checked again."""
        return is_success(self.status)

    @property
    def message(self) -> str:
        """What the status means and what to do next (for one run, not a batch), and how many
        evaluations failed."""
        failures = int(self.state.failures)
        told = f" {failures} of {int(self.work.points)} evaluations failed." if failures else ""
        return Status[self.status] + told

    def summary(self) -> str:
        """A few lines for people."""
        low, high = (float(end) for end in self.interval)
        kind = "certified" if self.provenance.certified else "estimated"
        work = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in self.work.as_dict().items())
        projected = "projected " if self.state.bounds is not None else ""
        lines = [
            self.message,
            f"value      {float(self.value):.10g} in [{low:.10g}, {high:.10g}] ({kind})",
            f"work       {work or 'none'}",
            f"steps      {int(self.steps)}",
        ]
        if self.gradient is not None:
            lines.insert(
                2,
                f"gradient   {projected}norm {float(self.gradient_norm):.3e}, "
                f"error at most {float(self.gradient_error):.3e} ({kind})",
            )
        if self.provenance.constants:
            lines.append(f"constants  {self.provenance}")
        return "\n".join(lines)


def row_index(count: Array, stride: int, size: int) -> Array:
    """Where the next row goes; the end of the buffers, where it is dropped, if it is not kept."""
    return jnp.where(count % stride == 0, count // stride, size)


def empty_history(size: int, stride: int, dtype: Any, recorded: dict[str, Any]) -> History:
    """Buffers for `size` rows, filled with NaN and zeros."""

    def column(dtype: Any = dtype) -> Array:
        fill = jnp.nan if jnp.issubdtype(dtype, jnp.floating) else 0
        return jnp.full(size, fill, dtype)

    names = History.__dataclass_fields__
    columns = {name: column() for name in names if name.endswith(("value", "error", "norm"))}
    columns |= {name: column() for name in names if name.endswith("tolerance")}
    counts = Work(**{name: column(jnp.result_type(int)) for name in Work.__dataclass_fields__})
    extra = {name: column(scalar.dtype) for name, scalar in recorded.items()}
    return History(
        **columns,
        work=counts,
        solver=extra,
        count=jnp.array(0, jnp.result_type(int)),
        stride=stride,
    )
