"""What all benchmarks share: figures with bars, groups that measure them, the printed table."""

import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "tolerax",
    "jax",
    "jaxlib",
    "equinox",
    "numpy",
    "scipy",
    "scikit-learn",
    "DFO-LS",
    "cbx",
    "cma",
    "optimistix",
    "lineax",
    "jaxopt",
    "Py-BOBYQA",
    "PyNomadBBO",
    "sif2jax",
    "optiprofiler",
)


@dataclass(frozen=True)
class Bar:
    """A figure's name, what it must reach, and what it means."""

    name: str
    sense: Literal["<=", ">="]
    limit: float
    meaning: str

    def met(self, value: float | None) -> bool:
        """Whether a value reaches the bar. A figure that could not be measured does not."""
        if value is None or math.isnan(value):
            return False
        return value <= self.limit if self.sense == "<=" else value >= self.limit


@dataclass(frozen=True)
class Settings:
    """How much to measure. Solvers and grids were tuned on seeds from 100; reports use 0, 1, ..."""

    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tell: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr))


@dataclass(frozen=True)
class Measured:
    """One figure: its value (the median over `samples` unless given) and what lies behind it."""

    samples: Sequence[float]
    value: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figure(self) -> float:
        """The reported value."""
        return statistics.median(self.samples) if self.value is None else self.value


@dataclass(frozen=True)
class Group:
    """Figures that one measurement gives. `measure` returns them by name."""

    name: str
    bars: tuple[Bar, ...]
    measure: Callable[[Settings], Mapping[str, Measured]]


def versions() -> dict[str, str]:
    """Versions of Python and of every package that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def finite(value: float) -> float | None:
    """The value as a float, `None` where it is not finite."""
    return float(value) if math.isfinite(value) else None


def run(groups: Iterable[Group], settings: Settings) -> dict[str, Any]:
    """Measure every group; one that fails leaves its figures empty and the rest untouched."""
    figures: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    errors: dict[str, str] = {}
    for group in groups:
        settings.tell(f"-- {group.name}")
        start = time.perf_counter()
        measured: Mapping[str, Measured] = {}
        try:
            measured = group.measure(settings)
        except Exception as error:  # a peer that fails must not take the other figures with it
            errors[group.name] = f"{type(error).__name__}: {error}"
            settings.tell(traceback.format_exc())
        seconds[group.name] = round(time.perf_counter() - start, 1)
        for bar in group.bars:
            found = measured.get(bar.name)
            # What never arrived is infinite, which JSON cannot say.
            figures[bar.name] = None if found is None else finite(found.figure)
            if found is not None:
                samples = [finite(sample) for sample in found.samples]
                details[bar.name] = {"samples": samples, **found.detail}
    return {
        "figures": figures,
        "versions": versions(),
        "quick": settings.quick,
        "seeds": list(settings.seeds),
        "seconds": seconds,
        "errors": errors,
        "details": details,
    }


def table(groups: Iterable[Group], result: Mapping[str, Any]) -> str:
    """Figures beside their bars, for people."""
    rows = [("figure", "value", "bar", "", "meaning")]
    for group in groups:
        for bar in group.bars:
            value = result["figures"].get(bar.name)
            shown = "none" if value is None else f"{value:.4g}"
            verdict = "met" if bar.met(value) else "MISSED"
            rows.append((bar.name, shown, f"{bar.sense} {bar.limit:g}", verdict, bar.meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + "  "
        + row[4]
        for row in rows
    ]
    for name, error in result["errors"].items():
        lines.append(f"{name} failed: {error}")
    spent = ", ".join(f"{name} {seconds:g} s" for name, seconds in result["seconds"].items())
    return "\n".join([*lines, f"time: {spent}"])


def last_line(result: Mapping[str, Any]) -> str:
    """The one JSON object that every benchmark prints last."""
    return json.dumps(
        {"figures": result["figures"], "versions": result["versions"]}, allow_nan=False
    )


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write figures, samples and details to `benchmarks/results`. Groups that were not measured
    this time keep what the file says of them, if it is of the same seeds and versions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if result['quick'] else ''}.json"
    whole = dict(result)
    if path.exists():
        before = json.loads(path.read_text())
        same = before["versions"].items() <= result["versions"].items()
        if same and all(before[key] == result[key] for key in ("seeds", "quick")):
            for key in ("figures", "details", "seconds", "errors"):
                whole[key] = {**before[key], **result[key]}
            for group in result["seconds"].keys() - result["errors"].keys():
                whole["errors"].pop(group, None)
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return path
