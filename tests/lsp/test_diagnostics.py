"""Test results as diagnostics."""

from __future__ import annotations

from pathlib import Path

from lsprotocol import types

from lsp_agent.lsp.capabilities import ClientFeatures
from lsp_agent.lsp.convert import uri_of
from lsp_agent.lsp.diagnostics import build, message, spots
from lsp_agent.lsp.documents import Document
from lsp_agent.lsp.results import Results
from lsp_agent.testing.results import Frame, TestResult, TestRun

SOURCE_TEXT = "def add(a, b):\n    raise ValueError('😀')\n"
TEST_TEXT = "from calc import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
FULL = ClientFeatures(diagnostic_data=True, related_information=True)


def is_protected(path: str) -> bool:
    return path.startswith("test_")


def failure(nodeid: str = "test_calc.py::test_add", *frames: Frame, **fields: object) -> TestResult:
    values: dict[str, object] = {"exception": "AssertionError", "message": "assert -1 == 3", "line": 3, **fields}
    return TestResult(nodeid, "failed", path="test_calc.py", frames=frames, **values)  # type: ignore[arg-type]


def results_of(*results: TestResult, documents: dict[str, Document] | None = None) -> Results:
    run = TestRun({r.nodeid: r for r in results}, 0.1, ("pytest",))
    return Results().after(run, documents or {})


def make_project(root: Path) -> None:
    (root / "calc.py").write_text(SOURCE_TEXT)
    (root / "test_calc.py").write_text(TEST_TEXT)


def test_the_deepest_frame_of_the_projects_own_source_is_marked_and_the_definition(tmp_path: Path) -> None:
    make_project(tmp_path)
    results = results_of(
        failure("test_calc.py::test_add", Frame("test_calc.py", 4, "test_add"), Frame("calc.py", 2, "add"))
    )
    found = build(results, tmp_path, {}, is_protected, FULL, "utf-16")
    in_source, in_test = found[uri_of(tmp_path / "calc.py")], found[uri_of(tmp_path / "test_calc.py")]
    assert [d.range for d in in_source] == [types.Range(types.Position(1, 4), types.Position(1, 26))]
    assert [d.range.start.line for d in in_test] == [2]
    assert in_source[0].message == "test_add fails: AssertionError: assert -1 == 3"
    assert (in_source[0].source, in_source[0].code) == ("lsp-agent", "failed")
    assert in_source[0].data == {"nodeids": ["test_calc.py::test_add"]}
    assert in_source[0].related_information is not None
    assert in_source[0].related_information[0].location == types.Location(
        uri_of(tmp_path / "test_calc.py"), in_test[0].range
    )
    assert in_test[0].related_information is not None
    assert in_test[0].related_information[0].location.uri == uri_of(tmp_path / "calc.py")


def test_a_failing_assertion_marks_the_assert_line(tmp_path: Path) -> None:
    make_project(tmp_path)
    results = results_of(failure("test_calc.py::test_add", Frame("test_calc.py", 4, "test_add")))
    found = build(results, tmp_path, {}, is_protected, FULL, "utf-16")
    assert sorted(d.range.start.line for d in found[uri_of(tmp_path / "test_calc.py")]) == [2, 3]


def test_tests_that_fail_at_one_line_share_its_diagnostic() -> None:
    results = results_of(
        *(failure(f"test_calc.py::test_add[{i}]", Frame("calc.py", 2, "add")) for i in range(7)),
    )
    source = next(s for s in spots(results, is_protected) if s.path == "calc.py")
    assert len(source.results) == 7
    assert message(source).startswith("7 tests fail here: test_add[0], test_add[1], test_add[2], ")
    assert "and 2 more: AssertionError: assert -1 == 3" in message(source)


def test_a_client_without_extras_gets_none(tmp_path: Path) -> None:
    make_project(tmp_path)
    results = results_of(failure("test_calc.py::test_add", Frame("calc.py", 2, "add")))
    for found in build(results, tmp_path, {}, is_protected, ClientFeatures(), "utf-16").values():
        for diagnostic in found:
            assert diagnostic.data is None
            assert diagnostic.related_information is None


def test_lines_follow_what_was_typed_since_the_run_and_edited_ones_lose_theirs(tmp_path: Path) -> None:
    make_project(tmp_path)
    path = tmp_path / "calc.py"
    ran_on = Document(uri_of(path), path, 1, SOURCE_TEXT)
    results = results_of(failure("test_calc.py::test_add", Frame("calc.py", 2, "add")), documents={"calc.py": ran_on})
    moved = Document(uri_of(path), path, 2, "# new\n" + SOURCE_TEXT)
    found = build(results, tmp_path, {"calc.py": moved}, is_protected, FULL, "utf-16")
    assert found[uri_of(path)][0].range.start.line == 2
    edited = Document(uri_of(path), path, 3, SOURCE_TEXT.replace("raise", "return"))
    found = build(results, tmp_path, {"calc.py": edited}, is_protected, FULL, "utf-16")
    assert uri_of(path) not in found


def test_a_run_of_some_tests_leaves_what_is_known_of_the_others() -> None:
    first = results_of(failure("t.py::test_a"), failure("t.py::test_b"), TestResult("t.py::test_c", "passed"))
    run = TestRun({"t.py::test_a": TestResult("t.py::test_a", "passed")}, 0.1, ("pytest",))
    assert first.after(run, {}, ["t.py::test_a"]).failing == ("t.py::test_b",)
    broken = TestRun({}, 0.1, ("pytest",), error="pytest is missing.")
    assert first.after(broken, {}) == first


def test_long_messages_are_cut_visibly() -> None:
    results = results_of(failure("test_calc.py::test_add", message="\n".join(f"line {i}" for i in range(30))))
    text = message(spots(results, is_protected)[0])
    assert text.endswith("\n…")
    assert len(text.splitlines()) == 9
