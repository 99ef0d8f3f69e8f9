"""Imports are complete or leave nothing; damaged files get one clear sentence."""

import hashlib

import gguf
import numpy as np
import pytest
from tiny_checkpoint import MIXED, Type, write_checkpoint

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny.gguf", MIXED)


def test_report_and_progress(checkpoint, tmp_path):
    seen = []
    report = import_checkpoint(checkpoint, tmp_path / "p", on_progress=lambda done, total: seen.append((done, total)))
    assert report.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert report.package_bytes == sum(path.stat().st_size for path in (tmp_path / "p").iterdir())
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert by_name["blk.0.attn_q.weight"].bits == 4 and by_name["blk.0.attn_v.weight"].bits == 8
    assert all(tensor.exact and tensor.relative_rms_error < 1e-6 for tensor in report.tensors)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_corrections_are_rounded_only_where_that_costs_nothing(tiny_package):
    def parts(kind):
        linear = Package(tiny_package(kind)).weights["blk.0.attn_qkv"]
        return [part for part in linear.parts if part.corrections is not None]

    assert all(part.correction_codes is not None for part in parts(Type.Q4_K))
    assert all(part.correction_codes is None for part in parts(Type.Q4_1))  # its zero lies outside the codes' range
    assert parts(Type.Q4_K) and parts(Type.Q4_1) and not parts(Type.Q8_0)


def test_importing_again_replaces_the_package(checkpoint, tmp_path):
    package = tmp_path / "p"
    import_checkpoint(checkpoint, package)
    (package / "stale").touch()
    import_checkpoint(checkpoint, package)
    assert not (package / "stale").exists()
    assert Package(package).config.hidden == 256


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.3, 0.7, 0.999])
def test_a_truncated_file(checkpoint, tmp_path, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"damaged|lacks|not a GGUF"):
        import_checkpoint(checkpoint, tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_other_files(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(UserError, match="not a GGUF file"):
        import_checkpoint(tmp_path / "x.gguf", tmp_path / "p")
    with pytest.raises(UserError, match="Cannot read"):
        import_checkpoint(tmp_path / "missing.gguf", tmp_path / "p")


def test_random_damage_never_ends_in_a_traceback(checkpoint, tmp_path):
    data = np.frombuffer(checkpoint.read_bytes(), np.uint8)
    random = np.random.RandomState(0)
    header = data.tobytes().index(b"output_norm.weight")  # damage to the weights themselves cannot be seen
    for _ in range(40):
        broken = data.copy()
        broken[random.randint(0, header, 3)] ^= random.randint(1, 256, 3).astype(np.uint8)
        checkpoint.write_bytes(broken.tobytes())
        try:
            import_checkpoint(checkpoint, tmp_path / "p")
        except UserError as error:
            assert "\n" not in str(error)


def test_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("a", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'mamba' are not supported"):
        import_checkpoint(tmp_path / "x.gguf", tmp_path / "p")


def test_packages_that_are_not_whole(tiny_package, tmp_path):
    with pytest.raises(UserError, match="not a complete model package"):
        Engine.load(tmp_path)
    package = tiny_package(Type.Q4_0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in package.iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(data[: len(data) // 2] if path.name == "weights.bin" else data)
    with pytest.raises(UserError, match="truncated"):
        Engine.load(copy)
    (copy / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not a complete model package"):
        Engine.load(copy)


def test_a_folder_that_is_no_package_is_not_replaced(tiny_package, tmp_path):
    source = tiny_package().parent / "tiny.gguf"
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no model package; give the path of a new folder"):
        import_checkpoint(source, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, then a package
        import_checkpoint(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "index.json").is_file()
