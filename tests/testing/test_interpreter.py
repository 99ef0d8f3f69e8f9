import subprocess
import sys
from pathlib import Path

import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.testing.interpreter import find_interpreter
from lsp_agent.testing.pytest_runner import PytestRunner


def make_venv(place: Path, *, with_pytest: bool = True) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    if with_pytest:
        mine = next(p for p in sys.path if p.endswith("site-packages"))
        (next(place.glob("lib/python*/site-packages")) / "mine.pth").write_text(mine + "\n")
    return place


def test_the_running_interpreter_is_the_last_resort(tmp_path):
    found = find_interpreter(tmp_path, environment={})
    assert found.executable == Path(sys.executable)
    assert found.version == sys.version_info[:3]
    assert Path(sys.prefix) in found.prefixes


@pytest.mark.parametrize("name", [".venv", "venv"])
def test_the_projects_environment_is_found(tmp_path, name):
    make_venv(tmp_path / name)
    assert find_interpreter(tmp_path, environment={}).executable == tmp_path / name / "bin/python"


def test_an_active_environment_comes_before_the_projects_and_a_setting_before_both(tmp_path):
    active, chosen = make_venv(tmp_path / "active"), make_venv(tmp_path / "chosen")
    make_venv(tmp_path / ".venv")
    environment = {"VIRTUAL_ENV": str(active)}
    assert find_interpreter(tmp_path, environment=environment).prefixes[0] == active
    for setting in (chosen, chosen / "bin/python"):
        assert find_interpreter(tmp_path, setting, environment).prefixes[0] == chosen


def test_conda(tmp_path):
    make_venv(tmp_path / "conda")
    found = find_interpreter(tmp_path, environment={"CONDA_PREFIX": str(tmp_path / "conda")})
    assert found.prefixes[0] == tmp_path / "conda"


def test_an_environment_without_pytest_is_one_sentence(tmp_path):
    make_venv(tmp_path / ".venv", with_pytest=False)
    with pytest.raises(UserError, match=r"pytest is not installed for .* install it there with"):
        find_interpreter(tmp_path, environment={})


def test_the_runner_raises_it(tmp_path, monkeypatch):
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    make_venv(tmp_path / ".venv", with_pytest=False)
    with pytest.raises(UserError, match="pytest is not installed"):
        PytestRunner(tmp_path).run(tmp_path, timeout_s=10, cancel=CancelToken())


def test_a_setting_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_interpreter(tmp_path, tmp_path / "nowhere")


def test_a_broken_interpreter(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="does not work"):
        find_interpreter(tmp_path, broken)


GOOD = '{"executable": "/p", "version": [3, 12, 1], "prefixes": ["/p"], "path": ["/p"], "pytest": true}'


@pytest.mark.parametrize(
    "answer",
    [
        "[]",
        "null",
        "{}",
        "7",
        "[" * 100_000,
        GOOD.replace("[3, 12, 1]", "[3]"),
        GOOD.replace("[3, 12, 1]", '["x", 1, 2]'),
        GOOD.replace("[3, 12, 1]", "null"),
        GOOD.replace('["/p"]', "null", 1),
        GOOD.replace('["/p"]', "[1]"),
        GOOD.replace('["/p"]', '["/p\\u0000"]'),
        GOOD.replace('"/p"', "[]", 1).replace("[]", "[1]", 1),
    ],
)
def test_an_odd_answer_is_one_sentence(tmp_path, answer):
    (tmp_path / "answer").write_text(answer)
    for content, works in ((answer, False), (GOOD, True)):
        (tmp_path / "answer").write_text(content)
        odd = tmp_path / "python"
        odd.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
        odd.chmod(0o755)
        if works:
            assert find_interpreter(tmp_path, odd).version == (3, 12, 1)
        else:
            with pytest.raises(UserError, match="does not work"):
                find_interpreter(tmp_path, odd)


def test_a_home_folder_of_nobody_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_interpreter(tmp_path, Path("~no-such-user-here/bin/python"))


def test_a_workspaces_interpreter_sees_neither_the_home_folder_nor_other_temporary_files(
    tmp_path, sandboxed, monkeypatch
):
    """What it sees it tells in its version, so that a look is known to have happened."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    home, root = tmp_path / "home", tmp_path / "home/work/project"
    monkeypatch.setenv("HOME", str(home))
    for name in ("notes/diary", ".mozilla/cookies", "work/project/source.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("secret")
    (tmp_path / "bus").write_text("a socket of another program")
    make_venv(root / ".venv")
    # What its own files name, too: nothing hidden is bound back for it.
    library = next((root / ".venv/lib").glob("python*/site-packages"))
    (library / "evil.pth").write_text(f"{home}\n{home}/.mozilla\n/run\n/tmp\n{tmp_path}\n{root}/src\n")
    (root / "src").mkdir()
    evil = root / ".venv/bin/python"
    looked = [home / "notes/diary", home / ".mozilla/cookies", tmp_path / "bus", root / "source.py", root / "src"]
    real = evil.resolve()
    evil.unlink()
    evil.write_text(
        f"#!{real}\nimport json, os\nfrom pathlib import Path\n"
        f"seen = [os.path.exists(p) for p in {[str(p) for p in looked]!r}] + [os.listdir('/run') != []]\n"
        f"print(json.dumps(dict(executable={str(evil)!r}, version=[sum(seen[:4]) + seen[5], int(seen[4]), 7],"
        "prefixes=[], path=[], pytest=True)))\n"
    )
    evil.chmod(0o755)
    assert looked[0].exists()
    assert PytestRunner(root).interpreter.version == (0, 1, 7)


def test_folders_of_editable_installs_are_seen_while_asking(tmp_path, sandboxed, monkeypatch):
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    library, root = tmp_path / "home/work/library/src", tmp_path / "home/work/project"
    library.mkdir(parents=True)
    make_venv(root / ".venv")
    (next((root / ".venv/lib").glob("python*/site-packages")) / "editable.pth").write_text(f"{library}\n")
    assert library in PytestRunner(root).interpreter.import_path


def test_a_workspace_cannot_smuggle_in_an_interpreter_that_writes(tmp_path, sandboxed):
    """A cloned repository may bring a `.venv`; the question that every interpreter is asked is asked in the sandbox."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/pyvenv.cfg").write_text("")
    evil = tmp_path / ".venv/bin/python"
    evil.write_text(f"#!/bin/sh\necho x > {tmp_path}/written\n")
    evil.chmod(0o755)
    runner = PytestRunner(tmp_path)
    with pytest.raises(UserError, match="does not work"):
        runner.interpreter  # noqa: B018
    assert not (tmp_path / "written").exists()
