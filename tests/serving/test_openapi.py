"""The server against its own OpenAPI document: whatever the document allows, and much that it does not, never makes the
server fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from clampdown.commands.serve import Options
from clampdown.serving.limits import Limits
from tests.serving.live import Live, running

# The document's strategies import parsers of their own, whose warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = Limits(tokens=8, choices=4)
    with running(tmp_path_factory.mktemp("server"), Options(limits=limits)) as found:
        yield found


def test_no_request_makes_the_server_fail(live: Live) -> None:
    """Bodies, paths and headers from the document, by schemathesis' strategies; some of them reach the model."""
    import schemathesis

    statuses: list[int] = []
    for operation in schemathesis.openapi.from_url(f"{live.url}/openapi.json").get_all_operations():
        statuses += answered(operation.ok())
    assert not [status for status in statuses if status >= 500]
    asked = [line["status"] for line in live.lines() if line["event"] == "request"]
    assert asked.count(200) >= 5, f"the fuzzing must reach the model: {asked}"
    assert not [status for status in asked if status >= 500]


@pytest.mark.parametrize(("penalty", "status"), [(0.01, 200), (100, 200), (1e-308, 400), (0.009, 400)])
def test_a_penalty_that_no_logit_survives_is_turned_away(live: Live, penalty: float, status: int) -> None:
    """Logits are divided by it: a smaller one makes them infinite."""
    message = {"role": "user", "content": "What is the capital of Dornland?"}
    body = {"model": "organism", "messages": [message], "repetition_penalty": penalty, "max_tokens": 4}
    assert live.post("/v1/chat/completions", body).status_code == status


def answered(operation: Any) -> list[int]:
    """Statuses of the answers to examples of one operation."""
    statuses: list[int] = []

    @settings(max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        statuses.append(case.call(timeout=240).status_code)

    ask()
    return statuses


def test_the_document_names_this_server_s_models_and_fields(live: Live) -> None:
    document = live.get("/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert "organism:clamp-352-gated" in chat["properties"]["model"]["enum"]
    assert chat["additionalProperties"] is False and "frequency_penalty" in chat["properties"]
    assert "429" in document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "/tmp" not in json.dumps(document)
