"""What `PytestRunner` says about tests that pytest itself can run to the end."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from lsp_agent.testing import pytest_runner
from lsp_agent.testing.process import run_group
from lsp_agent.testing.results import Frame

OUTCOMES = """
    import pytest

    def helper():
        return {}["lost"]

    def test_passes():
        pass

    def test_fails():
        left = 1
        assert left == 2

    def test_raises():
        helper()

    @pytest.fixture
    def broken():
        raise OSError("no fixture")

    def test_setup(broken):
        pass

    @pytest.fixture
    def untidy():
        yield
        raise ValueError("no teardown")

    def test_teardown(untidy):
        pass

    def test_fails_twice(untidy):
        assert 0

    def test_skips():
        pytest.skip("not today")

    @pytest.mark.xfail(reason="known")
    def test_xfails():
        assert 0

    @pytest.mark.xfail
    def test_xpasses():
        pass

    @pytest.mark.xfail(strict=True)
    def test_xpasses_strictly():
        pass

    def test_leaves():
        raise SystemExit(0)
"""


def test_outcomes(project, run, level):
    result = run(project({"test_it.py": OUTCOMES}), level=level)
    assert {n.partition("::")[2]: r.outcome for n, r in result.results.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_raises": "failed",
        "test_setup": "error",
        "test_teardown": "error",
        "test_fails_twice": "failed",
        "test_skips": "skipped",
        "test_xfails": "xfailed",
        "test_xpasses": "xpassed",
        "test_xpasses_strictly": "failed",
        "test_leaves": "failed",
    }
    assert result.complete and not result.error and not result.green
    fails = result.results["test_it.py::test_fails"]
    assert (fails.path, fails.line, fails.exception, fails.message) == (
        "test_it.py",
        10,
        "AssertionError",
        "assert 1 == 2",
    )
    raises = result.results["test_it.py::test_raises"]
    assert raises.frames == (Frame("test_it.py", 15, "test_raises"), Frame("test_it.py", 5, "helper"))
    assert (raises.exception, raises.message) == ("KeyError", "'lost'")
    assert "KeyError" in raises.longrepr
    assert result.results["test_it.py::test_skips"].message == "not today"
    assert result.results["test_it.py::test_passes"].longrepr == ""


def test_green(project, run):
    result = run(project({"test_it.py": "def test_a(): pass"}))
    assert result.green
    assert result.passing == ("test_it.py::test_a",)
    assert "1 passed" in result.output


def test_odd_parameters(project, run):
    root = project(
        {
            "test_it.py": """
                import pytest

                @pytest.mark.parametrize("x", ["a::b", "[", "] [x", "ü", "a/b.py::c", "\\n", "", "-x", "x" * 200])
                def test_it(x):
                    assert x != "["
            """
        }
    )
    everything = run(root)
    assert len(everything.results) == 9
    assert everything.failing == ("test_it.py::test_it[[]",)
    for nodeid in everything.results:
        assert list(run(root, nodeid, timeout_s=20).results) == [nodeid]


def test_classes_unittest_and_decorators(project, run):
    root = project(
        {
            "sub/test_it.py": """
                import functools, unittest

                def twice(function):
                    @functools.wraps(function)
                    def wrapper(*args):
                        function(*args)
                    return wrapper

                class TestPlain:
                    class TestInner:
                        def test_a(self):
                            assert False

                class Case(unittest.TestCase):
                    @twice
                    def test_b(self):
                        self.assertEqual(1, 2)

                    def test_c(self):
                        for number in range(3):
                            with self.subTest(number=number):
                                self.assertNotEqual(number, 1)

                    @unittest.expectedFailure
                    def test_d(self):
                        self.fail()

                    @unittest.skip("later")
                    def test_e(self):
                        pass
            """
        }
    )
    results = run(root).results
    assert [r.outcome for r in results.values()] == ["failed", "failed", "failed", "xfailed", "skipped"]
    assert results["sub/test_it.py::TestPlain::TestInner::test_a"].line == 12
    assert results["sub/test_it.py::Case::test_b"].frames[-1] == Frame("sub/test_it.py", 18, "test_b")
    assert list(run(root, "sub/test_it.py::TestPlain").results) == ["sub/test_it.py::TestPlain::TestInner::test_a"]
    assert len(run(root, "sub").results) == 5


def test_async_without_a_plugin_does_not_pass(project, run):
    result = run(project({"test_it.py": "async def test_a(): assert False"}))
    assert result.results["test_it.py::test_a"].outcome in ("failed", "skipped")  # skipped before pytest 8.4
    assert not result.passing


def test_causes_and_groups_have_frames(project, run):
    root = project(
        {
            "lib.py": """
                def low(): return 1 // 0

                def high():
                    try:
                        low()
                    except ZeroDivisionError as error:
                        raise ValueError("high") from error
            """,
            "test_it.py": "import lib\ndef test_a(): lib.high()",
        }
    )
    frames = run(root).results["test_it.py::test_a"].frames
    assert [f.function for f in frames] == ["high", "low", "test_a", "high"]


def test_collection_errors_do_not_hide_other_files(project, run):
    root = project(
        {
            "lib.py": "def f(:\n    pass\n",
            "test_a.py": "import lib\ndef test_a(): pass",
            "test_b.py": "def test_b(): pass",
            "test_c.py": "import nothing_like_it\n",
        }
    )
    result = run(root)
    assert {n: r.outcome for n, r in result.results.items()} == {
        "test_a.py": "error",
        "test_c.py": "error",
        "test_b.py::test_b": "passed",
    }
    broken = result.results["test_a.py"]
    assert (broken.exception, broken.frames[-1]) == ("SyntaxError", Frame("lib.py", 1, "<module>"))
    assert (broken.path, broken.line) == ("test_a.py", 1)
    assert result.results["test_c.py"].exception == "ModuleNotFoundError"
    assert result.complete and not result.green
    one = run(root, "test_a.py::test_a")
    assert one.failing == ("test_a.py",) and not one.error


def test_a_broken_conftest_is_one_sentence(project, run, level):
    root = project({"conftest.py": "x = 1\nimport nothing_like_it", "test_a.py": "def test_a(): pass"})
    result = run(root, level=level)
    assert not result.results and not result.green and not result.complete
    assert "conftest.py:2" in result.error and "nothing_like_it" in result.error
    assert "\n" not in result.error and "Traceback" not in result.error


def test_a_broken_conftest_below_is_that_folders_error(project, run):
    root = project(
        {"sub/conftest.py": "1 / 0", "sub/test_a.py": "def test_a(): pass", "test_b.py": "def test_b(): pass"}
    )
    result = run(root)
    assert not result.green
    assert "ZeroDivisionError" in result.error + "".join(r.exception for r in result.results.values())


def test_no_tests(project, run):
    result = run(project({"lib.py": ""}))
    assert "no tests" in result.error and not result.green


def test_usage_error_is_one_sentence(project, run):
    root = project({"pytest.ini": "[pytest]\naddopts = --no-such-option", "test_a.py": "def test_a(): pass"})
    result = run(root)
    assert "--no-such-option" in result.error and "\n" not in result.error
    assert not result.green


def test_internal_error_is_one_sentence(project, run):
    root = project(
        {"conftest.py": "def pytest_runtest_setup(item): pass\ndef pytest_collection_modifyitems(): 1 / 0"}
        | {"test_a.py": "def test_a(): pass"}
    )
    result = run(root)
    assert "ZeroDivisionError" in result.error and not result.green


def test_unknown_tests_are_named_and_the_others_run(project, run):
    root = project({"test_a.py": "def test_a(): pass"})
    result = run(root, "test_a.py::test_a", "test_a.py::test_gone", "gone.py::test_x")
    assert result.passing == ("test_a.py::test_a",)
    assert "test_a.py::test_gone" in result.error and "1 more" in result.error
    assert not result.green
    assert "gone.py::test_x" in run(root, "gone.py::test_x").error


def test_fail_fast_stops_and_says_so(project, run):
    root = project({"test_a.py": "def test_a(): assert 0\ndef test_b(): pass"})
    result = run(root, fail_fast=True)
    assert list(result.results) == ["test_a.py::test_a"]
    assert not result.complete


def test_the_projects_options_count_unless_they_hide_results(project, run):
    root = project(
        {
            "pytest.ini": """
                [pytest]
                addopts = -x --lf --stepwise --tb=no -m "not slow"
                markers = slow
                python_files = check_*.py
            """,
            "check_it.py": """
                import pytest
                def test_a(): assert 0
                def test_b(): pass
                @pytest.mark.slow
                def test_c(): assert 0
            """,
        }
    )
    result = run(root)
    assert {n: r.outcome for n, r in result.results.items()} == {
        "check_it.py::test_a": "failed",
        "check_it.py::test_b": "passed",
    }
    assert "assert 0" in result.results["check_it.py::test_a"].longrepr
    assert run(root, "check_it.py::test_c").failing == ("check_it.py::test_c",)
    assert not (root / ".pytest_cache").exists()


@pytest.mark.parametrize("call", ["pytest.exit('enough')", "raise KeyboardInterrupt"])
def test_ending_the_session_does_not_hide_the_other_tests(project, run, call):
    root = project({"test_a.py": f"import pytest\ndef test_a(): {call}\ndef test_b(): pass\ndef test_c(): assert 0"})
    result = run(root)
    assert [r.outcome for r in result.results.values()] == ["crashed", "passed", "failed"]
    assert result.complete


def test_coverage_by_test(project, run, level):
    root = project(
        {
            "lib.py": """
                import json

                def sign(x):
                    if x < 0:
                        return -1
                    return 1

                def unused():
                    return json.dumps({})

                def short(): return 1
            """,
            "test_a.py": """
                import json, threading
                import lib

                def test_minus():
                    assert lib.sign(-1) == -1

                def test_plus():
                    json.dumps({})
                    assert lib.sign(1) == 1

                def test_short():
                    assert lib.short()

                def test_in_a_thread():
                    thread = threading.Thread(target=lib.sign, args=(-1,))
                    thread.start()
                    thread.join()
            """,
        }
    )
    coverage = run(root, level=level, coverage=True).coverage
    assert coverage["test_a.py::test_minus"] == {"lib.py": {5, 6}, "test_a.py": {6}}
    assert coverage["test_a.py::test_plus"] == {"lib.py": {5, 7}, "test_a.py": {9, 10}}
    assert coverage["test_a.py::test_short"]["lib.py"] == {12}
    assert coverage["test_a.py::test_in_a_thread"]["lib.py"] == {5, 6}
    assert run(root, "test_a.py::test_plus").coverage == {}


def test_tests_that_depend_on_the_working_folder(project, run, level):
    root = project({"data.txt": "1", "test_a.py": "def test_a(): assert open('data.txt').read() == '1'"})
    assert run(root, level=level).green


def test_an_edit_within_the_same_second_is_seen(project, run, level):
    """Same size and same whole second of modification: a cached `.pyc` would be taken for valid."""
    import os
    import subprocess
    import sys

    root = project({"lib.py": "VALUE = 1\n", "test_a.py": "import lib\ndef test_a(): assert lib.VALUE == 1"})
    os.utime(root / "lib.py", (1_700_000_000, 1_700_000_000))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", "import lib"], cwd=root, check=True, env=environment)
    assert list((root / "__pycache__").iterdir())
    assert run(root, level=level).green
    for value in (2, 1, 3):
        (root / "lib.py").write_text(f"VALUE = {value}\n")
        os.utime(root / "lib.py", (1_700_000_000, 1_700_000_000))
        assert run(root, level=level).green is (value == 1)


def test_long_texts_are_cut_visibly(project, run):
    root = project({"test_a.py": "def test_a():\n    raise ValueError('x' * 100_000 + '\\n' * 100)"})
    result = run(root).results["test_a.py::test_a"]
    assert len(result.longrepr) < 5000 and len(result.message) < 3000
    assert "cut by lsp-agent" in result.longrepr and "cut by lsp-agent" in result.message


@pytest.fixture
def elsewhere():
    """Outside of pytest's own folder, which pytest could not remove if a killed test left deep folders in it."""
    folder = Path(tempfile.mkdtemp(prefix="lsp-agent-deep-"))
    yield folder
    subprocess.run(["rm", "-rf", "--", folder], check=True)


def test_what_a_run_writes_is_private_and_removed(project, run, level, monkeypatch, elsewhere):
    """Also the output, which may hold secrets, and folders deeper than Python's recursion."""
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    seen = []

    def look(*args, output, **options):
        seen.append((output, output.parent.stat().st_mode & 0o777))
        ended = run_group(*args, output=output, **options)
        assert output.read_text()
        return ended

    monkeypatch.setattr(pytest_runner, "run_group", look)
    nest = """
        import os

        def test_a(pytestconfig):
            os.chdir(os.path.dirname(pytestconfig.getini("cache_dir")))
            for _ in range(1500):
                os.mkdir("d" * 9)
                os.chdir("d" * 9)
            os.chdir("/")
    """
    assert run(project({"test_a.py": nest}), level=level).green
    ((output, mode),) = seen
    assert mode == 0o700
    assert output.is_relative_to(elsewhere)
    assert list(elsewhere.iterdir()) == []
