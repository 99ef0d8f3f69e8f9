"""Many clients at once that ask, stream, score and leave in mid-answer: who stays is answered, nothing stays taken."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from api_service import Service, serving

CLIENTS, ASKED = 6, 12


def ask_on(service: Service, number: int) -> list[str]:
    """What went wrong for one client."""
    chance, wrong = random.Random(number), []
    with service.http(headers={"X-LSP-Agent-Client": f"window {number}"}) as http:
        for asked in range(ASKED):
            text = f"def f{chance.randrange(3)}(a, b):\n    return a" + " + b" * chance.randrange(12)
            body: dict[str, Any] = {
                "prompt": text,
                "max_tokens": chance.choice([1, 8, 40]),
                "n": chance.choice([1, 1, 3]),
            }
            body["priority"] = chance.choice([-1, 0, 0])
            kind = chance.choice(["whole", "stream", "leave", "score", "form"])
            if kind == "score":
                body |= {"echo": True, "logprobs": 0, "max_tokens": 0}
            elif kind == "form":
                body |= {"structured_outputs": {"regex": "[ab]{4}"}}
            if kind in ("stream", "leave"):
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    lines = response.iter_lines()
                    seen = [next(lines)] if kind == "leave" else list(lines)
                good = response.status_code == 200 and (kind == "leave" or "data: [DONE]" in seen)
            else:
                response = http.post("/v1/completions", json=body)
                choices = response.json().get("choices", ())
                good = len(choices) == body["n"]
                if kind == "form" and body["max_tokens"] >= 8:
                    good = good and all(set(choice["text"]) <= set("ab") for choice in choices)
            if not good:
                wrong.append(f"{kind} {asked}: {response.status_code}")
    return wrong


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_all_who_stay_are_answered_and_nothing_stays_taken(kind: str, tiny_engine: Any, hf_engine: Any) -> None:
    engine = tiny_engine() if kind == "attention" else hf_engine("qwen3-next")
    with serving({"tiny": engine}) as service:
        with ThreadPoolExecutor(CLIENTS) as pool:
            assert [wrong for wrong in pool.map(lambda number: ask_on(service, number), range(CLIENTS)) if wrong] == []
        deadline = time.monotonic() + 10
        while service.server.busy or service.host.busy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status = service.host.status()["models"]["tiny"]
        assert status["queue"] == {"running": 0, "waiting": 0, "clients": {}}
        assert status["cache"]["taken"] == 0
