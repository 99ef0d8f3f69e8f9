"""What the engine's process says on standard output while it starts."""

import subprocess
import sys
import textwrap

MAIN = """
    import os, sys
    from lsp_agent.engine import engine
    from lsp_agent.engine.service import process
    from lsp_agent.errors import UserError

    def load(*arguments, on_progress, **options):
        print("Failed to load libcudnn.so.9")
        os.write(1, b"from a library in C\\n")
        on_progress(1, 2)
        raise UserError("Too little memory.")

    engine.Engine.load = load
    process.main()
"""


def test_what_libraries_print_goes_to_the_log(tmp_path):
    arguments = ["--name", "tiny", "--package", "p", "--socket", str(tmp_path / "s" / "e.sock"), "--idle-seconds", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(MAIN), *arguments], **pipes) as process:
        messages, log = process.stdout.read(), process.stderr.read()
    assert messages.splitlines() == [b'{"progress": [1, 2]}', b'{"error": "Too little memory."}']
    assert b"libcudnn.so.9" in log
    assert b"from a library in C" in log
