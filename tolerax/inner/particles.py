"""Sums and random numbers over particles that do not depend on how the particles are placed.

Particles are rows of arrays of shape (N, d). Where they are spread over devices, every device sums
whole blocks of rows, and the block sums are added in one fixed order, so that the order does not
depend on the number of devices. Random numbers are those of their position in the whole array.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from tolerax.contracts import Evaluation, Problem, Query
from tolerax.inner.noise import LARGE
from tolerax.inner.noise import blocks_of as blocks_of
from tolerax.inner.noise import normal as normal


def replicated(x: Array, sharding: NamedSharding | None) -> Array:
    """The same array on every device."""
    if sharding is None:
        return x
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def distributed(x: Array, sharding: NamedSharding | None) -> Array:
    """Rows of an array over the devices, as `sharding` says for the leading axis."""
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def total(change: Callable[..., Array], *rows: Array, over: NamedSharding | None = None) -> Array:
    """The sum of `change(*rows)` over the rows. On a CPU XLA would hold what it sums in memory as a
    whole: of many rows it is changed and summed block by block."""
    if over is not None:
        return _summed(lambda x: jnp.sum(x, axis=0), over, change(*rows))
    whole = lambda *rows: jnp.sum(change(*rows), axis=0)  # noqa: E731
    if rows[0].size <= LARGE:
        return whole(*rows)
    count = blocks_of(rows[0].shape[0])
    size = rows[0].shape[0] // count

    def by_blocks(*rows: Array) -> Array:
        def add(i: Array, sums: Array) -> Array:
            block = (jax.lax.dynamic_slice_in_dim(leaf, i * size, size) for leaf in rows)
            return sums + whole(*block)

        sums = jax.eval_shape(whole, *rows)
        return jax.lax.fori_loop(0, count, add, jnp.zeros(sums.shape, sums.dtype))

    return jax.lax.platform_dependent(*rows, cpu=by_blocks, default=whole)


def weighted_mean(
    w: Float[Array, " n"], x: Float[Array, "n d"], sharding: NamedSharding | None = None
) -> Float[Array, " d"]:
    """`sum_i w_i x_i / sum_i w_i`."""
    if sharding is None:
        return (w @ x) / jnp.sum(w)
    mean = _summed(lambda w, x: jnp.sum(w[:, None] * x, axis=0), sharding, w, x)
    return mean / total(lambda w: w, w, over=sharding)


def weighted_squares(
    w: Float[Array, " n"], x: Float[Array, "n d"], sharding: NamedSharding | None = None
) -> Float[Array, "d d"]:
    """`sum_i w_i x_i x_i'`."""
    squares = lambda w, x: (w[:, None] * x).T @ x  # noqa: E731
    return squares(w, x) if sharding is None else _summed(squares, sharding, w, x)


def times(
    x: Float[Array, "n d"], matrix: Float[Array, "d k"], sharding: NamedSharding | None = None
) -> Float[Array, "n k"]:
    """`x @ matrix`."""
    if sharding is None:
        return x @ matrix
    return _blockwise(lambda x: x @ matrix, sharding, x).reshape(x.shape[0], -1)


def everywhere(
    change: Callable[..., PyTree], sharding: NamedSharding | None, *arrays: Array
) -> PyTree:
    """`change(*arrays)`, computed as a whole on every device."""
    if sharding is None:
        return change(*arrays)
    here = PartitionSpec()
    return jax.shard_map(change, mesh=sharding.mesh, in_specs=here, out_specs=here)(*arrays)


def _summed(sums: Callable[..., Array], sharding: NamedSharding, *rows: Array) -> Array:
    """The sum of `sums` of all blocks."""
    return jnp.sum(replicated(_blockwise(sums, sharding, *rows), sharding), axis=0)


def _blockwise(change: Callable[..., Array], sharding: NamedSharding, *rows: Array) -> Array:
    """`change` of every block. Inside the loop over them, code is the same whatever the number of
    devices."""
    size = rows[0].shape[0] // blocks_of(rows[0].shape[0])

    def local(*rows: Array) -> Array:
        blocks = [leaf.reshape(-1, size, *leaf.shape[1:]) for leaf in rows]
        return jax.lax.map(lambda block: change(*block), blocks)

    spec = sharding.spec
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=spec, out_specs=spec)(*rows)


def when(
    flag: Bool[Array, ""],
    change: Callable[[Array, Array], Array],
    x: Shaped[Array, "*shape"],
) -> Shaped[Array, "*shape"]:
    """`change(x, flag)` if the flag is set, else x.

    A loop of at most one turn: unlike a conditional it copies nothing where the flag is not set,
    and of many runs at once `change` costs nothing while none of them needs it. What `change` does
    not derive from its arguments, though, XLA moves before the loop.
    """

    def once(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        flag, x = carry
        return jnp.zeros_like(flag), change(x, flag)

    return jax.lax.while_loop(lambda carry: carry[0], once, (flag, x))[1]


def first_differentiated(problem: Problem, query: Query) -> Evaluation:
    """The answer to a batch with derivatives at its first point only.

    What is masked out is not evaluated, unless many runs are mapped.
    """
    assert query.mask is not None
    part = lambda rows: jax.tree.map(lambda leaf: leaf[rows], query)  # noqa: E731
    rest = dataclasses.replace(part(slice(1, None)), derivatives=0, first_only=False)
    first = dataclasses.replace(part(0), mask=None, first_only=False)
    if problem.host:
        one = dataclasses.replace(part(slice(0, 1)), first_only=False)
        return _joined(problem.evaluate(one), problem.evaluate(rest))
    one = _if_wanted(problem, first, query.mask[0])
    rows = jax.tree.map(lambda leaf: leaf[None], only_rows(one))
    one = eqx.tree_at(_apart, rows, _apart(one), is_leaf=_is_none)
    return _joined(one, _if_wanted(problem, rest, jnp.any(query.mask[1:])))


def only_rows(answer: Evaluation) -> Evaluation:
    """What has a row for each point: without work and operators."""
    return eqx.tree_at(_apart, answer, (None,) * 6, is_leaf=_is_none)


def _apart(e: Evaluation) -> tuple:
    return e.work, e.hessian, e.jacobian, e.residuals_jacobian, e.metric, e.carry


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _joined(first: Evaluation, rest: Evaluation) -> Evaluation:
    """Two answers as one; the operators are those of the first, and there is no warm start."""
    unknown = lambda g: jnp.full((rest.value.shape[0], *g.shape[1:]), jnp.nan, g.dtype)  # noqa: E731
    gradient = jax.tree.map(unknown, first.gradient)
    rest = eqx.tree_at(lambda e: e.gradient, rest, gradient, is_leaf=_is_none)
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), only_rows(first), only_rows(rest))
    kept = (first.work + rest.work, *_apart(first)[1:-1], None)
    return eqx.tree_at(_apart, both, kept, is_leaf=_is_none)


def _if_wanted(problem: Problem, query: Query, wanted: Bool[Array, ""]) -> Evaluation:
    """An answer, or zeros in its place."""
    shapes = eqx.filter_eval_shape(problem.evaluate, query)
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), arrays)  # noqa: E731
    answer = lambda: eqx.filter(problem.evaluate(query), eqx.is_array)  # noqa: E731
    return eqx.combine(jax.lax.cond(wanted, answer, nothing), static)


def by_blocks(problem: Problem, query: Query) -> Evaluation:
    """The answer to a batch in blocks of fixed size; with a `sharding` every device evaluates what
    it holds.

    Compiled code may round differently for batches of different length: blocks always have the
    same one.
    """
    sharding = query.sharding
    assert query.mask is not None
    size = query.mask.shape[0] // blocks_of(query.mask.shape[0])
    asked, rest = eqx.partition(query, eqx.is_array)
    problem_arrays, problem_rest = eqx.partition(problem, eqx.is_array)

    def evaluate(arrays: PyTree, asked: PyTree) -> PyTree:
        return eqx.combine(arrays, problem_rest).evaluate(eqx.combine(asked, rest))

    def local(arrays: PyTree, asked: PyTree) -> PyTree:
        def block(i: Array) -> PyTree:
            rows = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size)  # noqa: E731
            return eqx.filter(evaluate(arrays, jax.tree.map(rows, asked)), eqx.is_array)

        found = jax.lax.map(block, jnp.arange(jax.tree.leaves(asked)[0].shape[0] // size))
        work = jax.tree.map(jnp.sum, found.work)
        if sharding is not None:
            work = jax.lax.psum(work, sharding.mesh.axis_names)
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
        return eqx.tree_at(lambda e: e.work, joined, work)

    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), asked)
    shapes = eqx.filter_eval_shape(evaluate, problem_arrays, one)
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    if sharding is None:
        return eqx.combine(local(problem_arrays, asked), static)
    rows, everywhere = sharding.spec, PartitionSpec()
    specs = jax.tree.map(lambda _: rows, arrays)
    specs = eqx.tree_at(lambda e: e.work, specs, jax.tree.map(lambda _: everywhere, arrays.work))
    spread = jax.shard_map(local, mesh=sharding.mesh, in_specs=(everywhere, rows), out_specs=specs)
    return eqx.combine(spread(problem_arrays, asked), static)


def in_parts(problem: Problem, query: Query) -> Evaluation:
    """The answer to a batch; on a CPU in blocks where there are so many numbers that what an
    objective computes on its way would take more memory than the points."""
    size = sum(leaf.size for leaf in jax.tree.leaves(query.x))
    if query.mask is None or query.derivatives or problem.host or size <= LARGE:
        return problem.evaluate(query)
    asked, rest = eqx.partition(query, eqx.is_array)
    outcome = eqx.filter_eval_shape(problem.evaluate, query)
    static = eqx.filter(outcome, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))

    def answer(how: Callable[[Query], Evaluation]) -> Callable[[PyTree], PyTree]:
        return lambda asked: eqx.filter(how(eqx.combine(asked, rest)), eqx.is_array)

    parts = answer(lambda query: by_blocks(problem, query))
    found = jax.lax.platform_dependent(asked, cpu=parts, default=answer(problem.evaluate))
    return eqx.combine(found, static)
