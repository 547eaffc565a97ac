"""Lanes in blocks that go through together, on one device or on several."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from tolerax.inner.residuals import Structured

# Lanes with as many entries in their Jacobians go through together on CPUs: with fewer the calls
# take longer than the arithmetic, with more the arrays leave the cache.
AT_ONCE = 2**18


def lanes_at_once(fun: Structured, w: Float[Array, "k n"], data: PyTree) -> int | None:
    """How many lanes go through together where nothing else was asked for."""
    if jax.default_backend() != "cpu":
        return None
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (w, data))
    _, jacobian = jax.eval_shape(fun.with_jacobian, *first)
    return max(1, AT_ONCE // max(1, sum(leaf.size for leaf in jax.tree.leaves(jacobian))))


def in_blocks(run: Any, block: int | None, sharding: NamedSharding | None, *trees: PyTree) -> Any:
    """`run` on blocks of lanes one after another, on each of the devices over which lanes are
    spread; what is missing to as many on each is filled up with the last lane.

    - `block`: the most lanes in a block. `None`: one on CPUs, all of them elsewhere.
    """
    count = jax.tree.leaves(trees)[0].shape[0]
    parts = 1 if sharding is None else sharding.num_devices
    share = -(-count // parts)
    if block is None:
        block = 1 if jax.default_backend() == "cpu" else share
    size = min(block, share)
    blocks = -(-share // size)
    if blocks == parts == 1:
        return run(*trees)
    # The last block begins early enough to be full: some of its lanes are done twice.
    starts = np.minimum(np.arange(blocks) * size, share - size)

    def blockwise(trees: PyTree) -> Any:
        def one(first: Array) -> Any:
            cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size)  # noqa: E731
            return run(*jax.tree.map(cut, trees))

        answers = jax.lax.map(one, jnp.asarray(starts))
        lane = np.arange(share)
        last = np.minimum(lane // size, blocks - 1)
        where = (last, lane - starts[last])
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        pick = flat if share == blocks * size else lambda leaf: leaf[where]
        return jax.tree.map(pick, answers)

    every = blockwise
    if sharding is not None:
        spec = PartitionSpec(sharding.mesh.axis_names)
        # Lanes of one device never wait for those of another: there is nothing to be checked.
        every = jax.shard_map(
            blockwise, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    if count == parts * share:
        return every(trees)
    index = np.minimum(np.arange(parts * share), count - 1)
    answers = every(jax.tree.map(lambda leaf: leaf[index], trees))
    return jax.tree.map(lambda leaf: leaf[:count], answers)


def one_by_one(run: Any, which: Bool[Array, " k"], lanes: PyTree, *trees: PyTree) -> PyTree:
    """The lanes after `run` on each of some, with the rest of what it takes; the others stay."""
    order = jnp.argsort(~which)

    def one(i: Array, lanes: PyTree) -> PyTree:
        k = order[i]
        alone = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, k, 1)  # noqa: E731
        new = run(*jax.tree.map(alone, (lanes, *trees)))
        put = lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, k, 0)  # noqa: E731
        return jax.tree.map(put, lanes, new)

    return jax.lax.fori_loop(0, jnp.sum(which), one, lanes)
