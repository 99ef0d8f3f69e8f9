"""An import that ends early, in whatever way, is continued: the result is that of one that was left alone."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_checkpoint import MIXED, write_checkpoint

from lsp_agent.engine.checkpoints import importing, partial_package
from lsp_agent.engine.checkpoints.importing import ImportPlan, import_checkpoint
from lsp_agent.engine.checkpoints.partial_package import partial_folder
from lsp_agent.engine.checkpoints.weight_writers import WeightImporter
from lsp_agent.engine.quantisation import SCHEMES
from lsp_agent.errors import UserError

NEXT = "qwen3-next"

# Another process that imports, says which weight it has written, and takes its time.
IMPORT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from lsp_agent.engine.checkpoints import partial_package
    from lsp_agent.engine.checkpoints.importing import import_checkpoint
    from lsp_agent.engine.checkpoints.weight_writers import WeightImporter

    source, package, scheme, pause = sys.argv[1:]
    partial_package.SYNC_SECONDS = 0.0
    fill = WeightImporter.fill

    def slowly(self, spec, tensors, weight):
        result = fill(self, spec, tensors, weight)
        print(spec.name, flush=True)
        time.sleep(float(pause))
        return result

    WeightImporter.fill = slowly
    import_checkpoint(Path(source), Path(package), scheme=scheme)
    print("complete", flush=True)
    """
)


def start_import(source: Path, package: Path, scheme: str = "int4", pause: float = 0.01) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", IMPORT, str(source), str(package), scheme, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journalled(package: Path) -> list[str]:
    try:
        lines = (partial_folder(package) / "journal").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [entry["weight"] for entry in entries if "weight" in entry]


@pytest.fixture
def gguf(tmp_path):
    return write_checkpoint(tmp_path / "tiny.gguf", MIXED)


@pytest.fixture
def filled(monkeypatch):
    """The weights that imports of this process write; `stop_after` of them the disk is full."""
    names: list[str] = []
    fill = WeightImporter.fill

    def watched(self, spec, tensors, weight):
        if len(names) == watched.stop_after:
            raise watched.error
        result = fill(self, spec, tensors, weight)
        names.append(spec.name)
        return result

    watched.stop_after, watched.error, watched.names = None, OSError(28, "No space left on device"), names
    monkeypatch.setattr(WeightImporter, "fill", watched)
    monkeypatch.setattr(partial_package, "SYNC_SECONDS", 0.0)
    return watched


def test_kill_9_at_random_points_changes_no_byte(hf_folder, tmp_path):
    source = hf_folder(NEXT, "BF16", 3)
    import_checkpoint(source, tmp_path / "whole", scheme="int4")
    package, seed = tmp_path / "killed", random.Random(os.urandom(4))
    kept: list[str] = []
    for _ in range(3):
        process = start_import(source, package)
        assert process.stdout
        written = [process.stdout.readline().strip() for _ in range(seed.randrange(2, 12))]
        time.sleep(seed.random() * 0.05)
        process.kill()
        written += process.stdout.read().split()
        process.wait()
        assert not package.exists()
        assert not set(written) & set(kept), "a finished weight was written again"
        assert set(kept) < set(journalled(package)) <= {*kept, *written}
        kept = journalled(package)
        assert len({*kept, *written} - set(kept)) <= 1, "more than the last weight was lost"
    process = start_import(source, package, pause=0)
    written = process.communicate(timeout=60)[0].split()
    assert written[-1] == "complete" and not set(written) & set(kept)
    assert contents(package) == contents(tmp_path / "whole")
    assert not partial_folder(package).exists()


@pytest.mark.parametrize("scheme", ["keep", "int8"])
def test_a_gguf_file_is_continued_too(gguf, tmp_path, filled, scheme):
    package = tmp_path / "p"
    import_checkpoint(gguf, tmp_path / "whole", scheme=scheme)
    filled.names.clear()
    filled.stop_after = 7
    with pytest.raises(UserError, match=r"No space left on device; free some space .* continues") as caught:
        import_checkpoint(gguf, package, scheme=scheme)
    assert "\n" not in str(caught.value) and not package.exists()
    assert journalled(package) == filled.names
    done = list(filled.names)
    filled.stop_after = None
    seen = []
    import_checkpoint(gguf, package, scheme=scheme, on_progress=lambda *step: seen.append(step))
    assert len(set(filled.names)) == len(filled.names) > len(done)
    assert contents(package) == contents(tmp_path / "whole")
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]


def test_ctrl_c_keeps_what_is_finished_and_nothing_else(gguf, tmp_path, filled):
    filled.stop_after, filled.error = 5, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(gguf, tmp_path / "p")
    assert len(journalled(tmp_path / "p")) == 5
    shutil.rmtree(partial_folder(tmp_path / "p"))
    filled.names.clear()
    filled.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(gguf, tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_ctrl_c_while_errors_are_measured_keeps_all_weights(gguf, tmp_path, filled, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImportPlan, "reports", interrupted)
        import_checkpoint(gguf, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    filled.names.clear()
    assert import_checkpoint(gguf, tmp_path / "p").tensors
    assert filled.names == []


def test_a_torn_journal_counts_as_far_as_it_is_whole(gguf, tmp_path, filled):
    import_checkpoint(gguf, tmp_path / "whole")
    filled.names.clear()
    filled.stop_after = 9
    with pytest.raises(UserError):
        import_checkpoint(gguf, tmp_path / "begun")
    filled.stop_after = None
    begun = partial_folder(tmp_path / "begun")
    journal = (begun / "journal").read_bytes()
    first = journal.index(b"\n") + 1
    for number, size in enumerate([0, 1, first - 1, first, first + 1, len(journal) // 2, len(journal) - 1]):
        package = tmp_path / f"p{number}"
        shutil.copytree(begun, partial_folder(package))
        (partial_folder(package) / "journal").write_bytes(journal[:size] + (b"\0\0garbage" if number % 2 else b""))
        filled.names.clear()
        import_checkpoint(gguf, package)
        assert contents(package) == contents(tmp_path / "whole")
        everything = len(ImportPlan(gguf).matched)
        assert (len(filled.names) == everything) == (size <= first + 1)


def change_time(folder, plan):
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))


def change_config(folder, plan):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


@pytest.mark.parametrize("change", [change_time, change_config], ids=lambda change: change.__name__)
def test_another_source_starts_anew(hf_folder, tmp_path, filled, change):
    source = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    filled.stop_after = 6
    with pytest.raises(UserError):
        import_checkpoint(source, tmp_path / "p", scheme="int8")
    assert len(journalled(tmp_path / "p")) == 6
    change(source, None)
    filled.stop_after = None
    filled.names.clear()
    import_checkpoint(source, tmp_path / "p", scheme="int8")
    assert len(filled.names) == len(ImportPlan(source).matched)


def test_another_scheme_starts_anew(hf_folder, tmp_path, filled):
    source = hf_folder(NEXT)
    filled.stop_after = 6
    with pytest.raises(UserError):
        import_checkpoint(source, tmp_path / "p", scheme="int8")
    filled.stop_after = None
    filled.names.clear()
    import_checkpoint(source, tmp_path / "p", scheme="int4")
    import_checkpoint(source, tmp_path / "whole", scheme="int4")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read_is_refused(hf_folder, tmp_path, filled):
    source = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    changed = []

    def on_progress(done, total):
        if len(filled.names) == 8 and not changed:
            changed.append(change_time(source, None))

    with pytest.raises(UserError, match="was changed while it was read"):
        import_checkpoint(source, tmp_path / "p", on_progress=on_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_only_what_can_be_continued_is_kept(gguf, tmp_path, filled):
    filled.stop_after, filled.error = 4, UserError("Tensor x is senseless.")
    with pytest.raises(UserError, match="senseless"):
        import_checkpoint(gguf, tmp_path / "p")
    assert not partial_folder(tmp_path / "p").exists()
    filled.names.clear()
    filled.error.__cause__ = OSError(5, "Input/output error")  # reading may succeed the next time
    with pytest.raises(UserError, match="senseless"):
        import_checkpoint(gguf, tmp_path / "p")
    assert len(journalled(tmp_path / "p")) == 4


def test_of_two_imports_at_once_one_is_told(hf_folder, tmp_path):
    process = start_import(hf_folder(NEXT), tmp_path / "p", pause=0.1)
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(UserError, match="Another process is importing"):
        import_checkpoint(hf_folder(NEXT), tmp_path / "p", scheme="int4")
    assert process.communicate(timeout=60)[0].endswith("complete\n")
    import_checkpoint(hf_folder(NEXT), tmp_path / "whole", scheme="int4")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["qwen3", NEXT])
def test_the_plan_knows_the_size_to_the_byte(hf_folder, tmp_path, name, scheme):
    plan = ImportPlan(hf_folder(name), scheme)
    report = plan.run(tmp_path / "p")
    assert plan.weights_bytes == (tmp_path / "p" / "weights.bin").stat().st_size
    assert plan.weights_bytes < report.package_bytes <= plan.package_bytes


def test_the_disk_is_checked_before_anything_is_written(gguf, tmp_path, monkeypatch):
    plan = ImportPlan(gguf)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: usage._replace(free=plan.package_bytes - 1))
    with pytest.raises(UserError, match=r"needs 0\.03 GB of disk.*has 0\.03 GB free; free some") as caught:
        import_checkpoint(gguf, tmp_path / "p")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: usage._replace(free=plan.package_bytes))
    import_checkpoint(gguf, tmp_path / "p")


def test_what_is_written_already_needs_no_disk(gguf, tmp_path, monkeypatch, filled):
    plan = ImportPlan(gguf)
    filled.stop_after = len(plan.matched) - 1
    with pytest.raises(UserError):
        import_checkpoint(gguf, tmp_path / "p")
    filled.stop_after = None
    usage = shutil.disk_usage(tmp_path)
    short = plan.package_bytes - plan.weights_bytes // 2  # too little for a whole package
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: usage._replace(free=short))
    with pytest.raises(UserError, match="of disk"):
        import_checkpoint(gguf, tmp_path / "other")
    import_checkpoint(gguf, tmp_path / "p")


def test_defaults_follow_size_and_type(hf_folder, gguf, tmp_path, monkeypatch):
    assert ImportPlan(gguf).scheme == "keep"
    assert ImportPlan(hf_folder(NEXT)).scheme == "int8"
    monkeypatch.setattr(importing, "BIG_PARAMETERS", 100_000)
    assert ImportPlan(hf_folder(NEXT)).scheme == "int4"
    assert import_checkpoint(hf_folder(NEXT), tmp_path / "p", scheme=None).scheme == "int4"
