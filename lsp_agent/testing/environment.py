"""The environment variables of a test run: an allow-list, never a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_[A-Z]+|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH"
    r"|PYTHONPATH|PYTHONUTF8|PYTHONIOENCODING|PYTHONWARNINGS|DJANGO_SETTINGS_MODULE|CI|NO_COLOR"
    r"|OMP_NUM_THREADS|OPENBLAS_[A-Z0-9_]+|MKL_NUM_THREADS|OPENBLAS_CORETYPE"
)
SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH|COOKIE|SESSION|_KEY$|_PAT$|DSN", re.I
)
SECRET_VALUE = re.compile(r"://[^/\s:@]+:[^/\s@]+@|^(gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|eyJ)")


def scrubbed_environment(passed: Iterable[str] = (), source: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that a test run sees.

    `passed` names further variables that the user lets through; a name or value that looks like a secret is dropped
    all the same. Hashes are seeded, so that runs repeat, and no bytecode is written: a `.pyc` is valid for a source
    of the same size and the same whole second, which an edit within that second keeps.
    """
    source = os.environ if source is None else source
    names = set(passed)
    environment = {
        name: value
        for name, value in source.items()
        if (ALLOWED.fullmatch(name) or name in names) and not SECRET.search(name) and not SECRET_VALUE.search(value)
    }
    environment.setdefault("PATH", os.defpath)
    environment.update(PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
    return environment
