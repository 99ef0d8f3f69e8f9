import hashlib
import json

from lsp_agent.testing.records import read_faults, read_session
from lsp_agent.testing.results import Frame

KEY = b"k" * 32


def line(sequence: int, kind: str, key: bytes = KEY, **fields: object) -> bytes:
    payload = json.dumps([sequence, kind, fields]).encode()
    return hashlib.blake2b(payload, key=key, digest_size=16).hexdigest().encode() + b" " + payload + b"\n"


SESSION = [
    line(0, "session"),
    line(1, "collected", tests=[["a.py::t", "a.py", 7]]),
    line(2, "start", nodeid="a.py::t"),
    line(3, "finish", nodeid="a.py::t", outcome="passed", seconds=0.5),
    line(4, "end", status=0),
]


def read(tmp_path, *lines: bytes):
    (tmp_path / "events").write_bytes(b"".join(lines))
    return read_session(tmp_path / "events", KEY)


def test_a_whole_session(tmp_path):
    session = read(tmp_path, *SESSION)
    assert session.intact and session.status == 0
    result = session.results["a.py::t"]
    assert (result.outcome, result.path, result.line, result.seconds) == ("passed", "a.py", 7, 0.5)


def test_what_was_known_at_the_kill_is_kept(tmp_path):
    session = read(tmp_path, *SESSION[:3], SESSION[3][:40])
    assert (session.running, session.status, session.results) == ("a.py::t", None, {})
    assert not session.intact


def test_foreign_replayed_and_missing_lines_stop_the_reading(tmp_path):
    forged = line(3, "finish", key=b"guess", nodeid="a.py::t", outcome="passed", seconds=0)
    for lines in (
        [*SESSION[:3], forged, *SESSION[4:]],
        [*SESSION[:3], SESSION[2], *SESSION[3:]],
        [*SESSION[:3], SESSION[4]],
        [*SESSION[:3], b"{}\n", *SESSION[3:]],
    ):
        session = read(tmp_path, *lines)
        assert not session.intact and session.status is None and not session.results


def test_a_missing_file(tmp_path):
    assert not read_session(tmp_path / "nothing", KEY).intact


FAULTS = """Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/w/lib.py", line 3 in die
  File "/w/.venv/lib/x.py", line 9 in inner
  File "/w/test_a.py", line 4 in test_b
  File "/x/site-packages/_pytest/python.py", line 1 in call

Extension modules: none
"""


def test_faults(tmp_path):
    (tmp_path / "faults").write_text(FAULTS)
    frames = read_faults(tmp_path / "faults", "/w", ["/w/.venv"])
    assert frames == (Frame("test_a.py", 4, "test_b"), Frame("lib.py", 3, "die"))
    assert read_faults(tmp_path / "nothing", "/w", []) == ()
