"""The frame: figures, bars, the last line, and that one failing peer leaves the rest standing."""

import json
import statistics

import pytest

from benchmarks import __main__ as program
from benchmarks import frame
from benchmarks.frame import Bar, Group, Measured, Settings


def groups() -> tuple[Group, ...]:
    def good(settings: Settings) -> dict[str, Measured]:
        return {"a": Measured([float(seed) for seed in settings.seeds])}

    def bad(settings: Settings) -> dict[str, Measured]:
        raise RuntimeError("peer is not installed")

    return (
        Group("good", (Bar("a", "<=", 2.0, "first"),), good),
        Group("bad", (Bar("b", ">=", 0.5, "second"),), bad),
    )


def test_a_failing_group_leaves_its_figures_empty_and_the_others_standing():
    said: list[str] = []
    result = frame.run(groups(), Settings(seeds=(0, 1, 5), tell=said.append))
    assert result["figures"] == {"a": 1.0, "b": None}
    assert result["errors"] == {"bad": "RuntimeError: peer is not installed"}
    assert any("Traceback" in line for line in said)
    table = frame.table(groups(), result)
    assert "met" in table.splitlines()[1]
    assert " none " in table.splitlines()[2]
    assert "MISSED" in table.splitlines()[2]


@pytest.mark.parametrize(
    ("sense", "limit", "value", "met"),
    [("<=", 1.0, 1.0, True), ("<=", 1.0, 1.1, False), (">=", 0.5, 0.6, True),
     (">=", 0.5, 0.4, False), ("<=", 1.0, None, False), ("<=", 1.0, float("nan"), False)],
)  # fmt: skip
def test_bars(sense, limit, value, met):
    assert Bar("x", sense, limit, "").met(value) is met


def test_the_last_line_is_one_json_object_also_where_a_run_never_arrived():
    result = frame.run(
        [Group("g", (Bar("a", "<=", 1, ""),), lambda s: {"a": Measured([1.0, float("inf")])})],
        Settings(),
    )
    line = frame.last_line(result)
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["figures"] == {"a": None}
    assert set(parsed) == {"figures", "versions"}
    assert {"python", "jax", "scipy"} <= set(parsed["versions"])
    assert "\n" not in line


def test_the_program_prints_table_and_json_and_saves(monkeypatch, capsys, tmp_path):
    import benchmarks.bilevel

    monkeypatch.setattr(benchmarks.bilevel, "GROUPS", groups())
    monkeypatch.setattr(frame, "RESULTS", tmp_path / "results")
    code = program.main(["bilevel", "--quick", "--seeds", "1", "2", "--save", "--only", "good"])
    out = capsys.readouterr().out.strip().splitlines()
    assert code == 0
    assert json.loads(out[-1])["figures"] == {"a": 1.5}
    saved = json.loads((tmp_path / "results" / "bilevel-quick.json").read_text())
    assert saved["details"]["a"]["samples"] == [1.0, 2.0]
    assert program.main(["bilevel", "--json"]) == 1  # a group failed
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


def test_unknown_names_are_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        program.main(["bilevel", "--only", "nonsense"])
    assert "smooth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["nothing"])


def test_the_figure_is_the_median():
    assert Measured([3.0, 1.0, 2.0]).figure == statistics.median([1, 2, 3])
    assert Measured([3.0, 1.0], value=7.0).figure == 7.0
