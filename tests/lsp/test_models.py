"""Which models are open: shared by folders, never closed under a job."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lsp_agent.cancel import CancelToken
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

    def open_model(name: str | None, _cancel: CancelToken | None = None) -> Any:
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


def test_a_model_is_not_closed_under_a_job_of_another_folder(opened: list[FakeModel]) -> None:
    models = Models()
    first = models.open("a")
    again = models.open("a")
    second = models.open("b")
    assert open_names(opened) == ["a", "b"]
    first.close()
    first.close()
    assert open_names(opened) == ["a", "b"], "another job still has it"
    again.close()
    assert open_names(opened) == ["b"]
    second.close()
    assert open_names(opened) == ["b"]
    models.open("a").close()
    assert open_names(opened) == ["a"], "an idle model makes place"


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

    def open_model(name: str | None, _cancel: CancelToken | None = None) -> Any:
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
