"""What a test run can reach, in the sandbox and without it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lsp_agent.testing import sandbox as sandbox_module
from lsp_agent.testing.environment import scrubbed_environment
from lsp_agent.testing.sandbox import Sandbox, SandboxReport, probe


def outcome(result) -> str:
    assert len(result.results) == 1, (result.error, result.output)
    (only,) = result.results.values()
    return only.message + only.outcome


def test_the_probe_says_what_protects():
    report = probe()
    assert report.level in ("full", "none")
    assert report.reason.endswith(".") and "\n" not in report.reason
    assert (report.level == "full") is (report.bwrap is not None)


def test_without_bubblewrap_the_report_says_so(monkeypatch):
    monkeypatch.setattr(sandbox_module, "find_bwrap", lambda: None)
    report = probe.__wrapped__()
    assert report.level == "none" and "bubblewrap is not installed" in report.reason


def test_a_bubblewrap_that_does_not_work_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sandbox_module, "find_bwrap", lambda: broken)
    report = probe.__wrapped__()
    assert report.level == "none" and "No permissions to create a new namespace" in report.reason


def test_switched_off_is_said(tmp_path):
    sandbox = Sandbox(tmp_path, enabled=False)
    assert sandbox.level == "none" and "switched it off" in sandbox.reason


NETWORK = """
    import socket

    def test_a():
        for address in (("1.1.1.1", 53), ("127.0.0.1", PORT)):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.settimeout(2)
                try:
                    client.connect(address)
                except OSError:
                    continue
                raise SystemExit("reached " + str(address))

    def test_loopback():
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname(), timeout=2)
        server.accept()[0].send(b"x")
        assert client.recv(1) == b"x"
"""


def test_no_network_but_loopback_of_its_own(project, run, sandboxed):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        root = project({"test_a.py": NETWORK.replace("PORT", str(server.getsockname()[1]))})
        result = run(root)
    assert result.green, result.results


def test_network_is_cut_without_bubblewrap_where_that_works(project, run):
    if sandbox_module._try([*sandbox_module._UNSHARE, "true"]):
        pytest.skip("unshare cannot make a network namespace here")
    report = SandboxReport("none", "for the test", None, True)
    import lsp_agent.testing.pytest_runner as runner_module
    from lsp_agent.cancel import CancelToken

    root = project(
        {
            "test_a.py": """
                import os, socket

                def test_a():
                    assert os.getuid() == UID
                    try:
                        socket.create_connection(("1.1.1.1", 53), timeout=2)
                    except OSError:
                        return
                    raise SystemExit("reached")
            """.replace("UID", str(os.getuid()))
        }
    )
    cut = Sandbox(root, enabled=False)
    cut.report = report
    result = runner_module.PytestRunner(root, sandbox=cut).run(root, timeout_s=30, cancel=CancelToken())
    assert result.green, result.results


def test_nothing_outside_the_tree_is_written(project, run, sandboxed, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    root = project(
        {
            "test_a.py": f"""
                import os, pathlib, shutil, tempfile

                def test_a():
                    for target in ({str(outside)!r}, "/usr", "/etc", "/var/lib", os.path.dirname(os.__file__)):
                        try:
                            (pathlib.Path(target) / "intruder").write_text("x")
                        except OSError:
                            continue
                        assert not pathlib.Path(target).is_relative_to("/usr"), target
                    shutil.rmtree({str(outside)!r}, ignore_errors=True)
                    pathlib.Path("inside.txt").write_text("x")
                    pathlib.Path(tempfile.gettempdir(), "scratch").write_text("x")
                    (pathlib.Path.home() / "dotfile").write_text("x")
            """
        }
    )
    result = run(root)
    assert result.green, result.results
    assert (outside / "precious.txt").read_text() == "mine"
    assert sorted(p.name for p in outside.iterdir()) == ["precious.txt"]
    assert not (Path.home() / "dotfile").exists()
    assert (root / "inside.txt").exists()


def test_the_home_folder_and_its_secrets_are_hidden(project, run, sandboxed, tmp_path, monkeypatch):
    home = tmp_path / "home"
    for name in (".ssh/id_ed25519", ".netrc", "work/other/notes.txt", ".config/x/token"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(home / "state"))
    (home / "state").mkdir()
    (home / "state" / "journal").write_text("secret")
    root = project(
        {
            "test_a.py": """
                import os, pathlib

                def test_a():
                    home = pathlib.Path.home()
                    assert home.is_dir()
                    assert [p for p in home.rglob("*")] == []
                    assert not [p for p in pathlib.Path("/run").rglob("*")]
            """
        }
    )
    result = run(root)
    assert result.green, result.results


def test_lsp_agents_own_folders_are_hidden_wherever_they_are(run, sandboxed, monkeypatch):
    """Outside of home and /tmp: the checkout's own folder stands for such a place."""
    import tempfile

    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(dir=here, prefix=".sandbox-test-") as name:
        base = Path(name)
        for folder in ("state", "cache", "project"):
            (base / folder).mkdir()
            (base / folder / "secret.txt").write_text("secret")
        monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(base / "state"))
        monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(base / "cache"))
        (base / "project" / "test_a.py").write_text(
            "import os\n"
            "def test_a():\n"
            f"    assert os.listdir({str(base / 'state')!r}) == os.listdir({str(base / 'cache')!r}) == []\n"
            "    assert os.path.exists('secret.txt')\n"
        )
        result = run(base / "project")
    assert result.green, (result.results, result.error)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


HISTORY = """
    import pathlib, subprocess

    def test_a():
        for folder in [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]:
            git = folder / ".git"
            assert not git.is_dir() or not list(git.iterdir()), git
            assert not git.is_file() or not git.read_text(), git
        done = subprocess.run(["git", "log", "-p", "--all"], capture_output=True, text=True)
        assert "the_fix" not in done.stdout
"""


@pytest.mark.parametrize("place", [".", "packages/one"])
def test_the_history_is_out_of_reach(project, run, sandboxed, place):
    root = project({f"{place}/test_a.py": HISTORY, f"{place}/lib.py": "the_fix = 1"})
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "the_fix")
    result = run((root / place).resolve())
    assert result.green, result.results


def test_the_history_around_a_workspace_is_out_of_reach(run, sandboxed):
    """Outside of home and /tmp: this checkout's own repository, where the tests run from one."""
    import tempfile

    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(dir=here, prefix=".sandbox-test-") as name:
        (Path(name) / "test_a.py").write_text(textwrap.dedent(HISTORY))
        result = run(Path(name))
    assert result.green, result.results


def test_the_history_of_a_worktree_is_out_of_reach(project, run, sandboxed, tmp_path):
    root = project(
        {"test_a.py": HISTORY.replace("import pathlib", f"main = {str(tmp_path / 'project')!r}; import pathlib")}
    )
    (root / "test_a.py").open("a").write("    assert not pathlib.Path(main, '.git', 'HEAD').exists()\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "the_fix")
    git(root, "worktree", "add", "-q", str(tmp_path / "tree"))
    result = run(tmp_path / "tree")
    assert result.green, result.results


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("below", ["", "sub"])
def test_the_repository_of_a_linked_worktree_outside_of_home_is_out_of_reach(run, sandboxed, relative, bare, below):
    """As `git worktree add` leaves it; `relative` as newer versions of git write it, and as submodules have it."""
    import tempfile

    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(dir=here, prefix=".sandbox-test-") as name:
        main, tree = Path(name, "main"), Path(name, "tree")
        (main / "sub").mkdir(parents=True)
        (main / "sub/the_fix.txt").write_text("1")
        git(main, "init", "-q")
        git(main, "add", ".")
        git(main, "commit", "-qm", "the_fix")
        repository = main / ".git"
        if bare:
            git(Path(name), "clone", "-q", "--bare", "main", "bare.git")
            repository = Path(name, "bare.git")
        git(repository, "worktree", "add", "-q", "-b", "other", str(tree))
        if relative:
            inner = (tree / ".git").read_text().removeprefix("gitdir:").strip()
            (tree / ".git").write_text(f"gitdir: {os.path.relpath(inner, tree)}\n")
        (tree / below / "test_a.py").write_text(
            f"import os, subprocess\ndef test_a():\n    assert os.listdir({str(repository)!r}) == []\n"
        )
        assert (repository / "HEAD").exists()
        result = run(tree / below)
    assert result.green, (result.results, result.error)


def test_a_git_file_cannot_hide_what_is_no_repository(project, run, sandboxed):
    root = project({"test_a.py": "def test_a(): assert __import__('os').listdir('/usr')", ".git": "gitdir: /usr\n"})
    assert run(root).green
    (root / ".git").write_bytes(b"gitdir: \0\n")
    assert run(root).green


def test_no_secret_reaches_the_environment(project, run, level, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "k")
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    monkeypatch.setenv("SOMETHING", "s")
    monkeypatch.setenv("DATABASE_URL", "postgres://user:hunter2@host/db")
    monkeypatch.setenv("PLAIN_SETTING", "yes")
    root = project(
        {
            "test_a.py": """
                import os

                def test_a():
                    seen = dict(part.partition("=")[::2] for part in open("/proc/self/environ").read().split("\\0"))
                    for source in (os.environ, seen):
                        assert not {"MY_API_KEY", "GITHUB_TOKEN", "SOMETHING", "DATABASE_URL"} & set(source)
                        assert source["PLAIN_SETTING"] == "yes"
                        assert source["PYTHONHASHSEED"] == "0"
            """
        }
    )
    result = run(root, level=level, pass_environment=("PLAIN_SETTING", "MY_API_KEY", "DATABASE_URL"))
    assert result.green, result.results


def test_the_environment_is_an_allow_list():
    source = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "AWS_SECRET_ACCESS_KEY": "x",
        "LSP_AGENT_STATE_DIR": "x",
        "PYTHONPATH": "src",
        "PYTHONSTARTUP": "x",
        "SSH_AUTH_SOCK": "x",
        "LANG": "ghp_0123456789",
    }
    kept = scrubbed_environment((), source)
    assert set(kept) == {"PATH", "LC_ALL", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE"}


def test_other_processes_are_invisible(project, run, sandboxed):
    root = project(
        {
            "test_a.py": f"""
                import os

                def test_a():
                    assert not os.path.exists("/proc/{os.getpid()}/root") or os.getpid() < 10
                    assert len([n for n in os.listdir("/proc") if n.isdigit()]) < 6
            """
        }
    )
    assert run(root).green


def test_no_capabilities_are_left(project, run, sandboxed):
    root = project(
        {
            "test_a.py": """
                def test_a():
                    lines = open("/proc/self/status").read().splitlines()
                    status = dict(line.split(":\\t") for line in lines if ":\\t" in line)
                    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
                    assert status["NoNewPrivs"] == "1"
            """
        }
    )
    assert run(root).green


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A virtual environment inside a project, with an editable install of it and this interpreter's pytest."""
    root = tmp_path_factory.mktemp("editable") / "project"
    (root / "src/pkg").mkdir(parents=True)
    (root / "src/pkg/__init__.py").write_text("import os\nVALUE = 1\nPLACE = os.path.abspath(__file__)\n")
    (root / "tests").mkdir()
    (root / "tests/test_a.py").write_text(
        "import pkg, subprocess, sys\n"
        "def test_a(): assert pkg.VALUE == 1, pkg.PLACE\n"
        "def test_prefix(): assert '.venv' in sys.prefix\n"
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    packages = next((root / ".venv/lib").glob("python*/site-packages"))
    mine = next(p for p in sys.path if p.endswith("site-packages"))
    (packages / "editable.pth").write_text(f"{root / 'src'}\n{mine}\n")
    return root


@pytest.mark.parametrize("value", [1, 2])
def test_the_scratch_tree_wins_over_an_editable_install(venv, run, level, tmp_path, monkeypatch, value):
    import shutil

    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    scratch = tmp_path / "scratch"
    shutil.copytree(venv, scratch, ignore=shutil.ignore_patterns(".venv"))
    module = scratch / "src/pkg/__init__.py"
    module.write_text(module.read_text().replace("VALUE = 1", f"VALUE = {value}"))
    result = run(venv, tree=scratch, level=level, interpreter=None)
    assert result.failing == (() if value == 1 else ("tests/test_a.py::test_a",)), result.results
    if value == 2:
        place = venv if level == "full" else scratch
        assert str(place / "src/pkg") in result.results["tests/test_a.py::test_a"].message
    assert not (venv / "inside.txt").exists()


def test_tests_write_to_the_scratch_tree_and_not_to_the_workspace(venv, run, sandboxed, tmp_path, monkeypatch):
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    scratch = tmp_path / "scratch"
    (scratch / "tests").mkdir(parents=True)
    (scratch / "tests/test_w.py").write_text(
        "import pathlib, pytest, sys\n"
        "def test_w():\n"
        f"    pathlib.Path({str(venv)!r}, 'written.txt').write_text('x')\n"
        "    with pytest.raises(OSError):\n"
        "        pathlib.Path(sys.prefix, 'written.txt').write_text('x')\n"
    )
    before = sorted(str(p) for p in venv.rglob("*"))
    result = run(venv, tree=scratch, interpreter=None)
    assert result.green, result.results
    assert (scratch / "written.txt").exists()
    assert sorted(str(p) for p in venv.rglob("*")) == before
    assert not (scratch / ".venv").exists()
