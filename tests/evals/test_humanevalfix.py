"""HumanEvalFix tasks become repositories; the harness runs, resumes and sums up."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lsp_agent.cli import app
from lsp_agent.errors import UserError
from lsp_agent.evals import harness
from lsp_agent.evals.humanevalfix import load, pytest_module, write_repository

ROW = {
    "task_id": "Python/900",
    "entry_point": "area",
    "declaration": "def area(width, height):\n",
    "buggy_solution": "    return width + height\n",
    "test": "\n\ndef check(area):\n\n    # A case.\n    assert area(3, 4) == 12, 'msg'\n    assert area(0, 2) == 0\n\n"
    "check(area)",
    "bug_type": "operator misuse",
}
FIX = {"on": "infill", "contains": "return <FILL>", "answers": ["width * height"]}
REWRITE = {"on": "chat", "answers": ["```python\ndef area(width, height):\n    return width * height\n```"]}


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_check_becomes_a_test_whose_asserts_pytest_can_explain(tmp_path: Path) -> None:
    (task,) = load(write(tmp_path / "tasks.jsonl", ROW))
    text = pytest_module(task)
    assert text.startswith("from solution import area\n\n\ndef test_area():\n")
    assert "    # A case.\n    assert area(3, 4) == 12, 'msg'\n" in text
    assert "check" not in text
    ast.parse(text)


def test_other_shapes_of_test_programs_are_kept_whole(tmp_path: Path) -> None:
    other = {**ROW, "test": "values = [1]\ncheck = area\nassert check(1, 1) == 1\n"}
    renamed = {**ROW, "test": "def check(candidate):\n    assert candidate(3, 4) == 12\n\ncheck(area)\n"}
    whole, alias = load(write(tmp_path / "tasks.jsonl", other, renamed))
    assert "def test_area():\n    values = [1]\n    check = area\n    assert" in pytest_module(whole)
    assert "def test_area():\n    candidate = area\n    assert candidate(3, 4) == 12\n" in pytest_module(alias)


def test_helpers_of_the_module_are_imported(tmp_path: Path) -> None:
    row = {
        **ROW,
        "declaration": "def double(x):\n    return 2 * x\n\n\ndef unused():\n    pass\n\n\ndef area(width, height):\n",
        "test": "def check(area):\n    assert double(area(1, 1)) == 2\n\ncheck(area)\n",
    }
    (task,) = load(write(tmp_path / "tasks.jsonl", row))
    assert pytest_module(task).startswith("from solution import area, double\n")
    write_repository(task, tmp_path / "project")
    assert sorted(p.name for p in (tmp_path / "project").iterdir()) == ["solution.py", "test_solution.py"]


@pytest.mark.parametrize("text", ["{", '{"task_id": "a"}\n', "[]\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="not a HumanEvalFix"):
        load(path)


def invoke(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["eval", "humanevalfix", *arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    shown: dict[str, object] = json.loads(result.stdout)
    return shown


def test_eval_runs_resumes_and_sums_up(tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", ROW, {**ROW, "task_id": "Python/901"}, {**ROW, "task_id": "Python/902"})
    script = tmp_path / "model.json"
    script.write_text(json.dumps({"rules": [FIX]}))
    out = tmp_path / "out"
    arguments = [str(tasks), "--model", f"scripted:{script}", "--out", str(out), "--max-seconds", "60"]
    first = invoke(*arguments, "--limit", "1")
    assert first["solved"] == 1 and first["total"] == 1 and first["stages"] == {"cloze": 1}
    (out / "fix.jsonl").open("a").write('{"task_id": "Python/901", "sol')  # a kill in the middle of a line
    both = invoke(*arguments, "--tasks", "Python/900,Python/901")
    assert both["solved"] == 2 and both["total"] == 2
    rows = harness.read_rows(out / "fix.jsonl")
    assert {(r["model"], r["seed"], r["max_seconds"]) for r in rows} == {(f"scripted:{script}", 0, 60.0)}
    assert [r["task_id"] for r in rows] == ["Python/900", "Python/901"]
    assert all(r["turns"] == rows[0]["turns"] and "width * height" in r["diff"] for r in rows)
    assert json.loads((out / "fix-summary.json").read_text())["solved"] == 2


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", "7"), ("--max-seconds", "61"), ("--model", "scripted:other.json")]
)
def test_results_of_other_settings_are_not_mixed(tmp_path: Path, option: str, value: str) -> None:
    tasks = write(tmp_path / "tasks.jsonl", ROW)
    given = {"--model": "scripted:one.json", "--max-seconds": "60", "--seed": "0", "--out": str(tmp_path / "out")}
    made = {"task_id": "Python/900", "solved": True, "seconds": 1.0}
    before = {**made, **harness.settings("scripted:one.json", 0, 60.0)}
    harness.append_row(tmp_path / "out" / "fix.jsonl", before)
    same = invoke(str(tasks), *[word for pair in given.items() for word in pair])
    assert same["solved"] == 1, "nothing was left to do"
    other = [word for pair in {**given, option: value}.items() for word in pair]
    result = CliRunner().invoke(app, ["eval", "humanevalfix", str(tasks), *other], standalone_mode=False)
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
    assert option in str(result.exception) and "another folder" in str(result.exception)
    assert harness.read_rows(tmp_path / "out" / "fix.jsonl") == [before]


def test_single_shot_control(tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", ROW)
    script = tmp_path / "model.json"
    for rules, solved in (([REWRITE], 1), ([FIX], 0)):
        script.write_text(json.dumps({"rules": rules}))
        shown = invoke(str(tasks), "--model", f"scripted:{script}", "--baseline", "single-shot")
        assert shown["kind"] == "single-shot" and shown["solved"] == solved and shown["total"] == 1


def test_unknown_task(tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", ROW)
    result = CliRunner().invoke(app, ["eval", "humanevalfix", str(tasks), "--tasks", "x"], standalone_mode=False)
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
