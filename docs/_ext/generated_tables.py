"""Tables that cannot rot: statuses from their enumerations, figures from benchmarks/results."""

import importlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tolerax.minimize import CODES
from tolerax.status import PointStatus, Status

ROOT = Path(__file__).parents[2]


def messages(enumeration: Any) -> dict[str, str]:
    """Names and messages of an Equinox enumeration, in the order of the source."""
    return {name: enumeration[item] for name, item in enumeration._name_to_item.items()}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


class Generated(SphinxDirective):
    """A directive whose Markdown is made here."""

    optional_arguments = 1

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        node = nodes.Element()
        self.state.nested_parse(StringList(self.lines(), "generated"), self.content_offset, node)
        return node.children


class StatusTable(Generated):
    """Every `Status` with its code in `minimize` and its message."""

    def lines(self) -> list[str]:
        rows = ((f"`{n}`", str(CODES.get(n, "")), text) for n, text in messages(Status).items())
        return table(("status", "code", "what it means, and what to do"), rows)


class PointStatusTable(Generated):
    """Every `PointStatus` with its message."""

    def lines(self) -> list[str]:
        rows = ((f"`{n}`", text or "As asked for.") for n, text in messages(PointStatus).items())
        return table(("status", "what it means"), rows)


class Figures(Generated):
    """The figures of a benchmark, `{figures} NAME`, from what its last saved run wrote; those that
    it lacks from that of a run with `--quick`."""

    def lines(self) -> list[str]:
        name = self.arguments[0]
        path = ROOT / "benchmarks/results" / f"{name}.json"
        self.env.note_dependency(str(path))
        if not path.exists():
            return [f"*No saved run yet: `python -m benchmarks {name} --save` makes one.*"]
        result = json.loads(path.read_text())
        short = path.with_name(f"{name}-quick.json")
        self.env.note_dependency(str(short))
        quick = json.loads(short.read_text()) if short.exists() else {"figures": {}, "details": {}}
        groups = importlib.import_module(f"benchmarks.{name}").GROUPS
        rows = []
        for bar in (bar for group in groups for bar in group.bars):
            value = result["figures"].get(bar.name)
            source, mark = (result, "") if value is not None else (quick, " (quick)")
            value = source["figures"].get(bar.name)
            samples = source["details"].get(bar.name, {}).get("samples", [])
            # What never arrived.
            samples = [math.inf if sample is None else sample for sample in samples]
            spread = f"{min(samples):.3g} … {max(samples):.3g}" if len(samples) > 1 else ""
            verdict = "not measured"
            if value is not None:
                verdict = f"**{value:.3g}**" if bar.met(value) else f"{value:.3g} (missed)"
                verdict += mark
            goal = f"{'≤' if bar.sense == '<=' else '≥'} {bar.limit:g}"
            rows.append((f"`{bar.name}`", verdict, goal, spread, bar.meaning))
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        seeds = ", ".join(map(str, result["seeds"]))
        said = f"Median over seeds {seeds}; {versions}."
        if any("(quick)" in row[1] for row in rows):
            few = ", ".join(map(str, quick["seeds"]))
            said += f" Where it says quick: of a run with `--quick`, seeds {few}."
        titles = ("figure", "measured", "bar", "range over seeds", "what it is")
        return [*table(titles, rows), "", said]


class Peers(Generated):
    """Success rates beside those of other methods, `{peers} NAME`, from the last saved run."""

    def lines(self) -> list[str]:
        path = ROOT / "benchmarks/results" / f"{self.arguments[0]}.json"
        self.env.note_dependency(str(path))
        return peers(json.loads(path.read_text())["details"])


def peers(details: dict[str, Any]) -> list[str]:
    """The rates of all figures that others were run beside, with their 95 % intervals of Wilson."""
    rows = []
    for figure, detail in details.items():
        if "peers" not in detail:
            continue
        own = {"": detail} if "rate" in detail else detail
        ours = {f"CBO {name}".strip(): d for name, d in own.items() if "rate" in d}
        for method, d in (ours | detail["peers"]).items():
            low, high = d["wilson"]
            rate, value = f"{d['rate']:.2f}", f"{d['median_value']:.1g}"
            interval = f"{low:.2f} … {high:.2f}"
            rows.append((f"`{figure}`", method, rate, interval, str(d["runs"]), value))
    return table(("figure", "method", "rate", "Wilson, 95 %", "runs", "median value"), rows)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("status-table", StatusTable)
    app.add_directive("point-status-table", PointStatusTable)
    app.add_directive("figures", Figures)
    app.add_directive("peers", Peers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
