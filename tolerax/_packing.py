"""A run in few arrays, for the compiled loop.

A run has some fifty scalars, and each would be a kernel of its own in every step. Packed by type,
they are written by a kernel each type.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from tolerax.solution import History, row_index


def _by_type(leaves: list[Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        found.setdefault(str(leaf.dtype), []).append(i)
    return found


class Table(eqx.Module):
    """A `History` whose columns of one type are those of one array."""

    blocks: dict[str, Array]
    count: Int[Array, ""]
    stride: int = eqx.field(static=True)

    @classmethod
    def of(cls, history: History) -> "Table":
        leaves = jax.tree.leaves(history.columns())
        blocks = {
            kind: jnp.stack([leaves[i] for i in which], axis=1)
            for kind, which in _by_type(leaves).items()
        }
        return cls(blocks, history.count, history.stride)

    def add(self, row: History) -> "Table":
        """One more row, as `History.add`."""
        leaves = jax.tree.leaves(row)
        groups = _by_type(leaves)
        index = row_index(self.count, self.stride, next(iter(self.blocks.values())).shape[0])
        blocks = {
            kind: block.at[index].set(jnp.stack([leaves[i] for i in groups[kind]]), mode="drop")
            for kind, block in self.blocks.items()
        }
        return Table(blocks, self.count + 1, self.stride)

    def history(self, like: History) -> History:
        """As a history again, of the structure of `like`."""
        leaves, structure = jax.tree.flatten(like.columns())
        for kind, which in _by_type(leaves).items():
            for column, i in enumerate(which):
                leaves[i] = self.blocks[kind][:, column]
        columns = jax.tree.unflatten(structure, leaves)
        return eqx.combine(columns, eqx.tree_at(lambda h: h.count, _no_columns(like), self.count))


def _no_columns(history: History) -> History:
    return eqx.filter(history, lambda leaf: eqx.is_array(leaf) and leaf.ndim != 1)


def packing(tree: PyTree, size: int = 0) -> tuple[Callable[[PyTree], Any], Callable[[Any], PyTree]]:
    """Two functions, to pack the scalars of trees like this one and to unpack them, and arrays of
    at most `size` numbers."""
    leaves, structure = jax.tree.flatten(tree)
    number = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool  # noqa: E731
    small = lambda leaf: leaf.ndim == 0 or leaf.size <= size  # noqa: E731
    packed = [i for i, leaf in enumerate(leaves) if small(leaf) and number(leaf)]
    groups = {
        kind: [packed[j] for j in which]
        for kind, which in _by_type([leaves[i] for i in packed]).items()
    }
    rest = [i for i in range(len(leaves)) if i not in set(packed)]
    shapes = [leaf.shape for leaf in leaves]

    def pack(tree: PyTree) -> Any:
        leaves = jax.tree.leaves(tree)
        vectors = {
            kind: jnp.concatenate([leaves[i].reshape(-1) for i in which])
            for kind, which in groups.items()
        }
        return vectors, [leaves[i] for i in rest]

    def unpack(packed: Any) -> PyTree:
        vectors, others = packed
        leaves: list[Any] = [None] * structure.num_leaves
        for kind, which in groups.items():
            begin = 0
            for i in which:
                end = begin + math.prod(shapes[i])
                leaves[i] = vectors[kind][begin:end].reshape(shapes[i])
                begin = end
        for i, leaf in zip(rest, others, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    return pack, unpack


def choose(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """`yes` or `no`, leaf by leaf."""
    pack, unpack = packing(no)
    return unpack(jax.tree.map(lambda a, b: jnp.where(condition, a, b), pack(yes), pack(no)))
