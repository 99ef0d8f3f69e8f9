"""What past prompts leave on disk survives a restart, within bounds, private, and only for the same model and graph."""

import os
import stat
import sys

import numpy as np
import pytest
from filelock import Timeout
from transcripts import Transcript, Witness, cold

from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.prefixes.disk import PrefixDisk, open_disk
from lsp_agent.engine.prefixes.limits import disk_limit
from lsp_agent.engine.session import Decoder

HYBRID, ATTENTION = "qwen3-next", "qwen3"
MODELS = pytest.mark.parametrize("name", [HYBRID, ATTENTION])
CONTEXT = 2048
PLENTY = 1 << 28


@pytest.fixture(scope="module")
def decoder_of(hf_package):
    made = {}

    def make(name):
        if name not in made:
            made[name] = Decoder(Package(hf_package(name)), 1, CONTEXT, "exact")
        return made[name]

    return make


@pytest.fixture
def start(decoder_of, tmp_path):
    """`start(name, memory, disk)`: whoever reads with the files in one folder."""

    def make(name, memory=PLENTY, disk=PLENTY, slots=1):
        decoder = decoder_of(name)
        files = PrefixDisk(tmp_path / "prefixes", decoder.states, disk)
        return Witness(decoder, PrefixCache(decoder.states, CONTEXT, slots, decoder.device, memory, files))

    return make


def files(tmp_path):
    return sorted((tmp_path / "prefixes").glob("*.prefix"))


def talks(reader, count=3, turns=3):
    system = Transcript(1).add("system", 90)
    every = [system.branch(1, number).add("user", 40) for number in range(count)]
    for _ in range(turns):
        for talk in every:
            reader.ask(talk)
            talk.add("tool", 60)
    return every


def restarted(start, reader, *arguments):
    reader.cache.close()
    other = start(*arguments)
    other.read, other.bits = reader.read, reader.bits
    return other


@MODELS
def test_nothing_is_read_again_after_a_restart(start, tmp_path, name):
    reader = start(name)
    every = talks(reader)
    assert reader.cache.stats().disk_bytes == 0 and not files(tmp_path)
    reader = restarted(start, reader, name)
    stats = reader.cache.stats()
    assert stats.disk_bytes == sum(path.stat().st_size for path in files(tmp_path)) > 0
    assert stats.disk_tokens > 500 and stats.memory_bytes == stats.states == 0
    for talk in every:
        ids, boundaries = talk.prompt()
        expected = len(ids) - reader.branch_point(ids, boundaries)
        ran = reader.ran
        state, logits = reader.begin(ids, boundaries)
        assert reader.ran - ran == expected and reader.unread(state) == []
        wanted, _ = cold(reader.decoder, ids)
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        reader.end(state)
    assert reader.cache.stats().found_on_disk > 0


@MODELS
def test_what_has_no_room_in_main_memory_goes_to_disk(start, name):
    reader = start(name, memory=200_000)
    every = [Transcript(number).add("user", 300) for number in range(4)]
    for _ in range(3):
        for talk in every:
            ids, boundaries = talk.prompt()
            expected = len(ids) - reader.branch_point(ids, boundaries)
            ran = reader.ran
            state, _ = reader.begin(ids, boundaries)
            assert reader.ran - ran == expected and reader.unread(state) == []
            reader.go_on(state, [*ids, *range(20, 30)])
            reader.end(state)
            talk.add("assistant", text=list(range(20, 30))).add("tool", 30)
    stats = reader.cache.stats()
    assert stats.evictions > 0 and stats.found_on_disk > 500 and stats.memory_bytes <= 200_000


@MODELS
def test_files_stay_within_their_limit(start, tmp_path, name):
    reader = start(name, memory=200_000, disk=600_000)
    for number in range(8):
        reader.ask(Transcript(number).add("user", 150 + 20 * number))
        size = sum(path.stat().st_size for path in files(tmp_path))
        assert size == reader.cache.stats().disk_bytes <= 600_000
    assert reader.cache.stats().disk_evictions > 0
    reader = restarted(start, reader, name, PLENTY, 300_000)
    assert 0 < reader.cache.stats().disk_bytes == sum(path.stat().st_size for path in files(tmp_path)) <= 300_000


@MODELS
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_read_again_from_its_tokens(start, tmp_path, name, damage):
    reader = start(name)
    (talk,) = talks(reader, count=1)
    reader = restarted(start, reader, name)
    for path in files(tmp_path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content if damage == "flipped" else content[:-3])
    ids, boundaries = talk.prompt()
    state, logits = reader.begin(ids, boundaries)
    assert reader.ran == len(ids)
    wanted, _ = cold(reader.decoder, ids)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert state.ids == ids


def test_files_that_make_no_sense_are_removed(start, tmp_path):
    reader = start(ATTENTION)
    talks(reader)
    reader.cache.close()
    first, second, third = files(tmp_path)[:3]
    second.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    third.write_bytes(b'lsp-agent prefix 1\n{"start": 0, "tokens": [1], "before": 3}\n')
    (tmp_path / "prefixes" / "half.new").write_bytes(b"a kill left this")
    reader = start(ATTENTION)
    assert not second.exists() and not third.exists() and not (tmp_path / "prefixes" / "half.new").exists()
    assert first.exists() or reader.cache.stats().disk_tokens == 0  # it may have followed one of those


@pytest.mark.skipif(sys.platform == "win32", reason="other permissions")
def test_files_are_the_users_alone(start, tmp_path):
    reader = start(ATTENTION)
    talks(reader, count=1)
    reader.cache.close()
    assert stat.S_IMODE((tmp_path / "prefixes").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "prefixes").iterdir()} == {0o600}


def test_one_process_has_the_files(start, tmp_path):
    reader = start(ATTENTION)
    with pytest.raises(Timeout):
        start(ATTENTION)
    reader.cache.close()
    start(ATTENTION)


def test_clearing_removes_the_files(start, tmp_path):
    reader = start(HYBRID, memory=100_000)
    talks(reader, count=2)
    assert files(tmp_path)
    reader.cache.clear()
    assert not files(tmp_path) and reader.cache.stats().disk_bytes == 0


def test_each_model_and_graph_has_its_own_files(tmp_path, monkeypatch, decoder_of, hf_package):
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LSP_AGENT_CACHE_DISK", "1 MiB")
    specs, package = decoder_of(ATTENTION).states, tmp_path / "package"
    package.mkdir()
    (package / "weights.bin").write_bytes(b"12")

    def folder(graph="cpu fast", layout=specs):
        opened = open_disk(package, graph, layout, disk_limit())
        opened.close()
        return opened._folder

    first = folder()
    assert first == folder() and first.is_relative_to(tmp_path)
    others = [folder("cuda fast"), folder(layout=specs[:-1])]
    (package / "prepacked-1.bin").write_bytes(b"made from the weights")
    assert folder() == first
    (package / "weights.bin").write_bytes(b"123")
    assert len({first, *others, folder()}) == 4
    assert open_disk(package, "cpu fast", specs, 0) is None


def test_folders_that_nobody_opens_any_more_are_removed(tmp_path, monkeypatch, decoder_of):
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    specs = decoder_of(ATTENTION).states
    (tmp_path / "package").mkdir()
    old, used, recent = (open_disk(tmp_path / "package", graph, specs, 1 << 20) for graph in ("old", "used", "recent"))
    for disk in (old, used):
        (disk._folder / "1.prefix").write_bytes(b"1")
        os.utime(disk._folder / "lock", (1, 1))
    old.close()
    recent.close()
    open_disk(tmp_path / "package", "new", specs, 1 << 20).close()
    assert not old._folder.exists()
    assert (used._folder / "1.prefix").exists() and recent._folder.exists()


def test_a_folder_that_cannot_be_used_is_done_without(tmp_path, monkeypatch, decoder_of, caplog):
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    (tmp_path / "prefixes").write_bytes(b"no folder")
    (tmp_path / "package").mkdir()
    assert open_disk(tmp_path / "package", "cpu fast", decoder_of(ATTENTION).states, 1 << 20) is None
    assert "not kept on disk" in caplog.text


def test_a_full_disk_is_done_without(start, monkeypatch, caplog):
    reader = start(ATTENTION, memory=100_000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsp_agent.engine.prefixes.disk.os.open", full)
    talks(reader, count=2)
    assert reader.cache.stats().disk_bytes == 0 and "No space left" in caplog.text
