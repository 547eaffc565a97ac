"""A run whose points are evaluated by Python code: one compiled call and few arrays a step.

An answer and the next question are one call. What is the same in all steps of a run (functions,
structures of pytrees) is looked at once, not in every step: dispatch costs more here than the
arithmetic of a solver.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tolerax import _loop
from tolerax._packing import Table, packing
from tolerax.contracts import Evaluation, Problem, Query, Solver
from tolerax.errors import WorkersLostError
from tolerax.solution import Run, Step
from tolerax.status import Status

SMALL = 256  # numbers: arrays up to here are packed


class RaisedError(Exception):
    """The objective raised; the cause says what."""


class Fixed:
    """Something that never changes, and is hashed once."""

    def __init__(self, *content: Any):
        self.content, self.hash = content, hash(content)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Fixed) or self.hash != other.hash:
            return False
        return self.content == other.content


class Static(Fixed):
    """What is left of a pytree without its arrays."""

    def __init__(self, structure: Any, rest: tuple):
        super().__init__(structure, rest)

    def join(self, arrays: Any) -> Any:
        """The tree with these arrays."""
        arrays = iter(arrays)
        structure, rest = self.content
        return structure.unflatten(next(arrays) if leaf is _ARRAY else leaf for leaf in rest)


_ARRAY = object()


def split(tree: PyTree) -> tuple[list, Static]:
    """The arrays of a tree (or their shapes), and the rest."""
    leaves, structure = jax.tree.flatten(tree)
    array = [eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    pairs = list(zip(leaves, array, strict=True))
    rest = tuple(_ARRAY if is_array else leaf for leaf, is_array in pairs)
    return [leaf for leaf, is_array in pairs if is_array], Static(structure, rest)


class Shapes(Fixed):
    """What a step is compiled for.

    - `parts`: problem, solver and limits; `run`, a run; `arrays`, the shapes of its arrays; `query`
      and `observed`: a question and an answer.
    """

    def __init__(
        self,
        parts: Static,
        run: Static,
        arrays: tuple[jax.ShapeDtypeStruct, ...],
        query: Static,
        observed: Static,
    ):
        super().__init__(parts, run, arrays, query, observed)
        self.parts, self.run, self.arrays, self.query, self.observed = self.content

    def pack(self, run: Run) -> Any:
        """A run in few arrays."""
        return self._packing()[0](eqx.filter(_with_table(run), eqx.is_array))

    def unpack(self, packed: Any) -> Run:
        """The run, with a table in the place of its history."""
        _, unpack, static = self._packing()
        return eqx.combine(unpack(packed), static)

    def _packing(self) -> tuple[Callable, Callable, PyTree]:
        run = eqx.filter_eval_shape(_with_table, self.run.join(self.arrays))
        shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
        arrays, static = eqx.partition(run, shape)
        return *packing(arrays, SMALL), static


@functools.lru_cache
def _known(shapes: Shapes) -> Shapes:
    """The same as in earlier runs: what is the same object need not be compared at every step."""
    return shapes


def _with_table(run: Run) -> Run:
    return eqx.tree_at(lambda r: r.history, run, Table.of(run.history))


class Steps:
    """Questions and answers of a run, one at a time.

    `going` says whether it goes on, `number` how many answers it has been told.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        run: Run,
        limits: _loop.Limits,
        callback: Callable[[Step], Any] | None,
    ):
        self._problem, self._callback = problem, callback
        outline = problem.outline()
        self._parts, parts = split((outline, solver, limits))
        arrays, rest = split(run)
        shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        query, answer = _outlined(parts, _outlines(self._parts), rest, _outlines(arrays))
        # Bound once: that takes longer than a step of some solvers.
        self._observe = _observer(problem, query)
        nothing, observed = split(answer)
        unasked, asked = split(query)
        self._shapes = _known(Shapes(parts, rest, shapes, asked, observed))
        self._run: Run | None = run
        self._packed = _packed(self._shapes, arrays)
        self._query = [_zeros(array) for array in unasked]
        self._tell([np.zeros(array.shape, array.dtype) for array in nothing], first=True)
        self._run = run

    @property
    def run(self) -> Run:
        """The run as it is now."""
        run = self._run
        if run is None:
            run = self._shapes.run.join(_unpacked(self._shapes, self._packed))
            self._run = run
        return run

    @property
    def scalars(self) -> dict[str, float]:
        """What is shown of the run."""
        value, norm = np.asarray(self._shown)
        return {"value": float(value), "gradient_norm": float(norm), "work": float(self._units)}

    def advance(self, last: int) -> None:
        """Ask, observe and tell, once."""
        del last
        query = self._shapes.query.join(self._query)
        try:
            observed = self._observe(query)
        except (StopIteration, WorkersLostError):
            raise
        except Exception as error:
            raise RaisedError from error
        arrays, static = split(observed)
        if static != self._shapes.observed:
            self._shapes = _known(Shapes(*self._shapes.content[:-1], static))
        self._tell(arrays)
        if self._callback is not None:
            evaluation = _read_compiled(self._problem.outline(), query, observed)
            self._callback(Step(query, evaluation, self.run))

    def _tell(self, observed: list, first: bool = False) -> None:
        found = _step(self._shapes, self._parts, self._packed, self._query, observed, first)
        self._packed, self._query, counts, self._shown = found
        going, self.number, self._units = np.asarray(counts).tolist()
        self.going = bool(going)
        self._run = None


def _outlines(arrays: list) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and types, also whether a type gives way to others."""
    weak = lambda array: getattr(array, "weak_type", False)  # noqa: E731
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=weak(a)) for a in arrays)


@functools.lru_cache
def _outlined(
    parts: Static,
    given: tuple[jax.ShapeDtypeStruct, ...],
    run: Static,
    arrays: tuple[jax.ShapeDtypeStruct, ...],
) -> tuple[Query, Any]:
    """The shapes of a question and of what Python code answers."""
    problem, solver, limits = parts.join(given)
    query = eqx.filter_eval_shape(_loop.ask, solver, run.join(arrays), limits)
    return query, eqx.filter_eval_shape(_observer(problem, query), query)


def _observer(problem: Problem, query: Query) -> Callable[[Query], Any]:
    """What asks Python code questions like this one, for arrays that compiled code reads."""
    return functools.partial(_loop.evaluated, problem) if query.first_only else problem.observe


def _read(problem: Problem, query: Query, observed: Any) -> Evaluation:
    """The answer that was observed."""
    return observed if query.first_only else problem.interpret(query, observed)


_read_compiled = eqx.filter_jit(_read)


def _zeros(like: Any) -> jax.Array:
    return jax.lax.full(like.shape, 0, like.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _packed(shapes: Shapes, arrays: list) -> Any:
    return shapes.pack(shapes.run.join(arrays))


@functools.partial(jax.jit, static_argnums=0)
def _unpacked(shapes: Shapes, packed: Any) -> list:
    run = shapes.unpack(packed)
    like = shapes.run.join(map(_zeros, shapes.arrays)).history
    return split(eqx.tree_at(lambda r: r.history, run, run.history.history(like)))[0]


@functools.partial(jax.jit, static_argnums=0)
def _step(
    shapes: Shapes, parts: list, packed: Any, asked: list, observed: list, first: Any
) -> tuple[Any, list, Any, Any]:
    """Tell what was observed, unless this is the `first` call, and ask.

    Both are always the same code, so that a run that was saved and goes on is the same to the bit.
    """
    problem, solver, limits = shapes.parts.join(parts)

    def told(packed: Any) -> Any:
        query = shapes.query.join(asked)
        evaluation = _read(problem, query, shapes.observed.join(observed))
        run = _loop.tell(solver, shapes.unpack(packed), query, evaluation)
        pack = shapes._packing()[0]
        return pack(eqx.filter(run, eqx.is_array))

    packed = jax.lax.cond(first, lambda packed: packed, told, packed)
    run = shapes.unpack(packed)
    query = split(_loop.ask(solver, run, limits))[0]
    going = (run.status == Status.running) & ~_loop.spent(run.work, limits)
    counts = jnp.stack([going.astype(run.step.dtype), run.step, run.work.units])
    return packed, query, counts, jnp.stack([run.best.value, run.best.gradient_norm])
