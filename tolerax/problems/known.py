"""What is known about the points of one function: cache, journal, and points never to be tried."""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from tolerax.errors import JournalError
from tolerax.fingerprint import fingerprint
from tolerax.problems.journal import Journal
from tolerax.problems.python_code import Outcome, Row, Wanted, failed


class Ticket(NamedTuple):
    """The name of one evaluation: a digest of the bits of the point and of what is wanted, and how
    often that had been asked before."""

    key: str
    nth: int


class Plan(NamedTuple):
    """What is known of a batch: rows, with `None` where there are none yet; a ticket for each
    point; and points that repeat another one of the batch."""

    rows: list[Row | None]
    tickets: list[Ticket | None]
    repeats: dict[int, int]


class Known:
    """Remembers the rows of one function.

    - `cache`: answer a point that was asked before from memory.
    - `journal`: path of a file with all rows; rows that it has already are given again, the first
      row of a point for its first evaluation and so on. Hence a run repeats itself even if the
      function is random.
    """

    def __init__(
        self,
        fun: Callable,
        wanted: Wanted,
        cache: bool,
        journal: str | os.PathLike[str] | None,
        counts: Counter,
    ):
        self._about = _about(fun, wanted)
        self._cache: dict[str, Row] | None = {} if cache else None
        self._poison: set[str] = set()
        self._asked: Counter = Counter()
        self._past: dict[Ticket, dict] = {}
        self._counts = counts
        self._journal = None
        if journal is None:
            return
        self._journal = Journal(journal, fingerprint(self._about), fun)
        for record in self._journal.records:
            key, nth = record.get("key"), record.get("nth")
            if not isinstance(key, str) or type(nth) is not int:
                self.close()
                raise _not_a_row("key or nth")
            ticket = Ticket(key, nth)
            self._past[ticket] = record
            if record.get("outcome") == "lost":
                self._poison.add(ticket.key)
        self._journal.records.clear()

    def is_about(self, fun: Callable, wanted: Wanted) -> bool:
        """Whether this is what `fun` gave, differentiated and bounded like that."""
        same = zip(self._about, _about(fun, wanted), strict=True)
        return all(one is other for one, other in same)

    def plan(self, points: Sequence[PyTree], wanted: Wanted) -> Plan:
        """What is known of these points, in their order."""
        count = len(points)
        plan = Plan([None] * count, [None] * count, {})
        if self._cache is None and self._journal is None and not self._poison:
            return plan
        first: dict[str, int] = {}
        for i, x in enumerate(points):
            key = name(x, wanted)
            if self._cache is not None and key in first:
                plan.repeats[i] = first[key]
                continue
            first[key] = i
            plan.rows[i], plan.tickets[i] = self._recall(key, x, wanted)
        return plan

    def _recall(self, key: str, x: PyTree, wanted: Wanted) -> tuple[Row | None, Ticket | None]:
        if self._cache is not None and key in self._cache:
            self._counts["cached"] += 1
            return self._cache[key]._replace(calls=0), None
        ticket = Ticket(key, self._asked[key])
        self._asked[key] += 1
        if ticket in self._past:
            row = _decoded(self._past.pop(ticket), x, wanted)
            self._counts["replayed"] += 1
            if self._cache is not None:
                self._cache[key] = row
            return row, None
        if key in self._poison:
            return failed(x, wanted.derivatives, calls=0)._replace(outcome="lost"), None
        return None, ticket

    def keep(self, ticket: Ticket | None, x: PyTree, wanted: Wanted, row: Row) -> None:
        """Remember what was evaluated."""
        if row.outcome == "lost":
            self._poison.add(name(x, wanted) if ticket is None else ticket.key)
        if ticket is None:
            return
        if self._cache is not None:
            self._cache[ticket.key] = row
        if self._journal is not None:
            self._journal.append(_encoded(ticket, row))

    def sync(self) -> None:
        """Force the journal to disk."""
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        """Close the journal; what is known stays known."""
        if self._journal is not None:
            self._journal.close()


def _about(fun: Callable, wanted: Wanted) -> tuple:
    return fun, wanted.gradient, wanted.bounds, wanted.constraints


def name(x: PyTree, wanted: Wanted) -> str:
    """A digest of every bit of the point, and of what is wanted there."""
    leaves, structure = jax.tree.flatten(x)
    # The accuracy that is asked for matters to differences only.
    tolerance = float(wanted.tolerance).hex() if isinstance(wanted.gradient, str) else ""
    digest = hashlib.sha256(f"{structure} {wanted.derivatives} {tolerance}".encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:32]


def _encoded(ticket: Ticket, row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"key": ticket.key, "nth": ticket.nth, "calls": row.calls}
    record["outcome"] = row.outcome
    for number in ("value", "value_error", "gradient_error"):
        record[number] = float(getattr(row, number)).hex()
    if row.gradient is not None:
        leaves = jax.tree.leaves(row.gradient)
        record["gradient"] = [base64.b64encode(np.asarray(g).tobytes()).decode() for g in leaves]
    if row.error:
        record["error"] = row.error
    for name in ("constraints", "residuals"):
        if getattr(row, name) is not None:
            record[name] = [float(number).hex() for number in getattr(row, name)]
    return record


def _decoded(record: dict[str, Any], x: PyTree, wanted: Wanted) -> Row:
    """The row in a record; whoever wrote it, nothing else than a row comes out."""
    try:
        numbers = [float.fromhex(record[n]) for n in ("value", "value_error", "gradient_error")]
        calls, outcome, error = record["calls"], record["outcome"], record.get("error", "")
        if type(calls) is not int or calls < 0 or not isinstance(error, str):
            raise ValueError("calls or error")
        if outcome not in Outcome.__args__:
            raise ValueError("outcome")
        gradient = None
        if wanted.derivatives:
            leaves, structure = jax.tree.flatten(x)
            parts = zip(record["gradient"], leaves, strict=True)
            gradient = [
                np.frombuffer(base64.b64decode(g, validate=True), leaf.dtype).reshape(leaf.shape)
                for g, leaf in parts
            ]
            gradient = jax.tree.unflatten(structure, gradient)
        row = Row(numbers[0], numbers[1], gradient, numbers[2], calls, outcome, error)
        counts = {"constraints": wanted.constraint_count, "residuals": wanted.residual_count}
        for name in counts.keys() & record.keys():
            many = np.array([float.fromhex(number) for number in record[name]])
            if many.size != counts[name]:
                raise ValueError(name)
            row = row._replace(**{name: many})
        if wanted.residual_count is not None and outcome == "answered" and row.residuals is None:
            raise ValueError("residuals")
        return row
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _not_a_row(error) from error


def _not_a_row(why: Any) -> JournalError:
    return JournalError(
        f"the journal holds a record that is none ({why}): begin a new one under another path."
    )
