"""Which models are open: shared by folders, never closed under a job."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.config import Backend
from lsp_agent.errors import Cancelled, UserError
from lsp_agent.lsp.models import Models


class FakeModel:
    """Knows whether it is open."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """Every model that was opened, in order."""
    models: list[FakeModel] = []

    def open_model(name: str | None, _cancel: CancelToken | None = None, backend: Any = None) -> Any:
        if name == "missing":
            raise UserError("There is no such model.")
        models.append(FakeModel(name))
        return models[-1]

    monkeypatch.setattr("lsp_agent.models.open_model", open_model)
    return models


def open_names(opened: list[FakeModel]) -> list[str | None]:
    return [model.name for model in opened if not model.closed]


def test_the_model_stays_open_for_the_next_job(opened: list[FakeModel]) -> None:
    models = Models()
    for _ in range(2):
        models.open("a").close()
    assert [model.name for model in opened] == ["a"]
    assert open_names(opened) == ["a"]


def test_a_job_that_closes_its_model_takes_it_from_nobody(opened: list[FakeModel]) -> None:
    models = Models()
    first, again, second = models.open("a"), models.open("a"), models.open("b")
    for lent in (first, first, second):
        lent.close()
    assert open_names(opened) == ["a", "b"], "other windows pay nothing for an open connection"
    again.close()
    models.open("a")
    assert [model.name for model in opened] == ["a", "b"]


def test_a_model_server_is_not_taken_for_the_default_model(opened: list[FakeModel]) -> None:
    models, backend = Models(), Backend(url="http://127.0.0.1:9/v1")
    models.open(None)
    models.open(None, backend=backend)
    models.open(None, backend=Backend(url="http://127.0.0.1:9/v1"))
    assert len(opened) == 2
    assert models.problem(None, backend) is None and models.check(None, backend) is None


def test_what_cannot_be_opened_leaves_the_others_usable(opened: list[FakeModel]) -> None:
    models = Models()
    first = models.open("a")
    with pytest.raises(UserError):
        models.open("missing")
    assert open_names(opened) == ["a"]
    first.close()
    models.open("a").close()
    assert [model.name for model in opened] == ["a"]


def test_waiting_for_another_folders_model_to_load_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def open_model(name: str | None, _cancel: CancelToken | None = None, backend: Any = None) -> Any:
        loading.set()
        loaded.wait(10)
        return FakeModel(name)

    monkeypatch.setattr("lsp_agent.models.open_model", open_model)
    models = Models()
    thread = threading.Thread(target=models.open, args=("a",))
    thread.start()
    assert loading.wait(5)
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        models.open("b", cancel)
    loaded.set()
    thread.join(5)


def test_closing_closes_everything_for_good(opened: list[FakeModel]) -> None:
    models = Models()
    lent = models.open("a")
    models.open("b")
    models.close()
    models.close()
    assert open_names(opened) == []
    lent.close()
    with pytest.raises(Cancelled):
        models.open("a")
