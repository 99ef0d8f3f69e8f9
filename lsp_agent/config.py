"""Settings: `lsp-agent.toml` in the workspace, environment variables `LSP_AGENT_*`, the editor's initializationOptions.

Later ones win. The workspace's file comes with other people's code, so it cannot switch the sandbox
off, nor name a model by a path, nor an interpreter outside of the workspace.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from lsp_agent.chat_model import Tier
from lsp_agent.errors import ExitCode, UserError

FILE_NAME = "lsp-agent.toml"
NOT_FROM_WORKSPACE = frozenset({"sandbox", "backend"})
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Backend(BaseModel):
    """A model server that somebody else runs: vLLM, llama.cpp's, or another with OpenAI's API. Its key is no setting.

    What is None is asked of the server, or told by the model's name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    """Base address of its API, such as https://models.example.com/v1; without a path, /v1 is meant."""
    model: str | None = None
    """The model's name there; None: the only one that it lists."""
    context_length: int | None = Field(None, ge=512)
    """Most tokens of prompt and answer together."""
    tier: Tier | None = None
    """What the model can be asked to do."""
    family: Literal["qwen", "starcoder", "deepseek-coder", "codegemma", "none"] | None = None
    """How the model is asked to fill in the middle, where the server leaves that to the client."""

    @field_validator("url")
    @classmethod
    def _whole(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = None
        if not usable or parts.query or parts.fragment or not value.isprintable() or " " in value:
            raise ValueError("give an address such as https://models.example.com/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("leave the user and the password out, and give the key as LSP_AGENT_BACKEND_KEY")
        path = parts.path.rstrip("/") or "/v1"
        return f"{parts.scheme}://{parts.netloc}{path}"

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent stays on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class Settings(BaseSettings):
    """What a user may set, for one workspace folder."""

    model_config = SettingsConfigDict(
        env_prefix="LSP_AGENT_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    model: str | None = None
    """Installed model to use; None: the default that `lsp-agent doctor` names."""
    backend: Backend | None = None
    """Model server to use instead of the engine; a `model` that the user names wins."""
    max_turns: int = Field(300, ge=1)
    """Most calls of the model in one run."""
    max_seconds: float = Field(600.0, gt=0)
    """Longest run, in seconds."""
    test_timeout_seconds: float = Field(300.0, gt=0)
    """Longest run of the whole test suite, in seconds."""
    interpreter: Path | None = None
    """Python that runs the tests; None: the project's virtual environment. Relative to the workspace."""
    pytest_args: tuple[str, ...] = ()
    """Further arguments of every pytest run."""
    run_tests_on_save: Literal["off", "failing", "all"] = "failing"
    """What runs when files change after a first run by hand: nothing (stale results are removed), the tests that
    failed last (the default: cheap, and never before the user ran the tests once), or all."""
    sandbox: bool = True
    """Run tests without network and with a read-only file system."""

    @field_validator("interpreter")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        try:
            return value.expanduser() if value is not None else None
        except RuntimeError:
            raise ValueError(f"{str(value)!r} starts with a home folder that does not exist") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings passes it by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: initialization options, environment, workspace file."""
        assert isinstance(init_settings, InitSettingsSource)
        given = dict(init_settings.init_kwargs)
        workspace_file = given.pop("_workspace_file", {})
        return (
            InitSettingsSource(settings_cls, given),
            env_settings,
            InitSettingsSource(settings_cls, workspace_file),
        )


def load_settings(root: Path | None, options: Mapping[str, Any] | None = None) -> Settings:
    """The settings for the workspace folder `root` (None: no folder), with the caller's `options` on top.

    `options` may be written in camelCase and may be nested under `lspAgent`, as editors send them. Raises `UserError`
    that names the setting and where it came from.
    """
    given = _snake_case(options or {})
    workspace_file = _read(root / FILE_NAME) if root is not None else {}
    try:
        settings = Settings(**{"_workspace_file": workspace_file, **given})
        if settings.backend is not None:  # a model that only the project names is its wish, not the user's
            workspace_file.pop("model", None)
            settings = Settings(**{"_workspace_file": workspace_file, **given})
    except ValidationError as error:
        first = error.errors()[0]
        top = str(first["loc"][0]) if first["loc"] else ""
        name = ".".join(part for part in first["loc"] if isinstance(part, str)) or "settings"
        where = "the editor's options" if top in given else FILE_NAME if top in workspace_file else "the environment"
        raise UserError(f"The setting {name!r} in {where} is not usable: {_what(first)}.", ExitCode.USAGE) from error
    except SettingsError as error:  # only of variables, and only of `pytest_args`: the others are no JSON
        raise UserError(
            'The environment variable LSP_AGENT_PYTEST_ARGS is not usable: give a JSON list, such as ["-x"].',
            ExitCode.USAGE,
        ) from error
    if settings.interpreter is None or root is None:
        return settings
    return settings.model_copy(update={"interpreter": root / settings.interpreter})  # as it is, if it is absolute


def _what(error: ErrorDetails) -> str:
    """What is wrong with a setting, as the end of a sentence."""
    if error["type"] == "extra_forbidden":
        return "there is no such setting"
    if error["type"] == "model_type":
        return "set its parts, such as backend.url or LSP_AGENT_BACKEND__URL"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"].rstrip(".")
    return message[:1].lower() + message[1:]


def _snake_case(options: Mapping[str, Any]) -> dict[str, Any]:
    nested = options.get("lspAgent", options.get("lsp-agent"))
    if isinstance(nested, Mapping):
        options = nested
    pairs = {re.sub(r"(?<!^)(?=[A-Z])", "_", key).lower(): value for key, value in options.items()}
    return {
        key: _snake_case(value) if isinstance(value, Mapping) else value
        for key, value in pairs.items()
        if value is not None and not key.startswith("_")
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read: {error}.", ExitCode.USAGE) from error
    for name in values:
        if name not in Settings.model_fields:  # `Sandbox` neither, which pydantic-settings would take for `sandbox`
            raise UserError(
                f"The setting {name!r} in {path.name} is not usable: there is no such setting.", ExitCode.USAGE
            )
    for name in NOT_FROM_WORKSPACE & values.keys():
        raise UserError(
            f"{path.name} may not set {name!r}, because it comes with the code it would guard against; "
            f"set it in your editor or as LSP_AGENT_{name.upper()}{'__URL' if name == 'backend' else ''}.",
            ExitCode.USAGE,
        )
    model = values.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL_NAME.fullmatch(model)):
        raise UserError(f"{path.name} may name an installed model only, not {model!r}.", ExitCode.USAGE)
    interpreter = values.get("interpreter")
    if isinstance(interpreter, str) and not _is_inside(interpreter, path.parent):
        raise UserError(
            f"{path.name} may name an interpreter inside the workspace only, not {interpreter!r}; "
            "set it in your editor or as LSP_AGENT_INTERPRETER.",
            ExitCode.USAGE,
        )
    return values


def _is_inside(path: str, root: Path) -> bool:
    """By its name: a virtual environment's own interpreter is a link to one outside."""
    place = Path(os.path.normpath(root / path))
    return not path.startswith("~") and "\0" not in path and place.is_relative_to(os.path.normpath(root))
