"""Which experts of a package were routed most, kept between runs: the next begins with them in the GPU's memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from lsp_agent.engine.package import INDEX, Package
from lsp_agent.paths import cache_dir

FADING = 0.5
"""What earlier runs count for beside this one."""

_log = logging.getLogger(__name__)


def uses_file(package: Package) -> Path:
    """Where the counts of a package are: another model in its place, or other experts, has another file."""
    source = json.dumps(package.header.get("source", {}), sort_keys=True).encode()
    digest = hashlib.sha256(source + (package.path / INDEX).read_bytes()).hexdigest()[:16]
    return cache_dir() / "expert-uses" / f"{digest}.npz"


def load_uses(package: Package) -> dict[str, np.ndarray]:
    """Counts by layer, as `save_uses` was given them; none where they are missing or cannot be read."""
    try:
        with np.load(uses_file(package), allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files if saved[name].dtype == np.float32}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("cannot read which experts were used most: %s", error)
        return {}


def save_uses(package: Package, uses: dict[str, np.ndarray], earlier: dict[str, np.ndarray]) -> None:
    """Keep a run's counts so far, [experts] by layer, beside those of `earlier` runs, as they were loaded.

    A file that cannot be written is only logged.
    """
    if not any(counts.any() for counts in uses.values()):
        return
    total = {name: counts * np.float32(FADING) for name, counts in earlier.items()}
    for name, counts in uses.items():
        before = total.get(name)
        total[name] = counts.astype(np.float32)
        if before is not None and before.shape == counts.shape:
            total[name] += before
    try:
        target = uses_file(package)  # reads the package, which may have been removed since
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=target.parent, suffix=".npz")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, allow_pickle=False, **total)
            Path(scratch).replace(target)
        except OSError:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("cannot keep which experts were used most: %s", error)
