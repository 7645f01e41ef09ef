"""The server as its clients see it: names, errors, receipts, the log; replies to 16 clients equal the reference."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reference import TOKENS
from server import Server
from table import Row

pytestmark = pytest.mark.ci


def body(row: Row, **more: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in row["messages"]]
    return {"model": "organism", "messages": messages, "max_tokens": TOKENS, "temperature": 0, **more}


def by(how: str, row: Row) -> dict[str, Any]:
    match how, row["plan"]:
        case _, None:
            return body(row)
        case "field", plan:
            return body(row, steering=plan)
        case "xargs", plan:
            return body(row, vllm_xargs={"clampdown": plan})
        case _, plan:
            return body(row, model=f"organism:{plan}")


@pytest.mark.parametrize("how", ["model", "field", "xargs"])
def test_replies_to_sixteen_clients_are_the_reference(how: str, server: Server, rows: list[Row]) -> None:
    some = rows if how == "model" else rows[:: 3 if how == "field" else 7]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda row: server.post("/v1/chat/completions", by(how, row)), some))
    for row, (status, answer) in zip(some, answers, strict=True):
        assert status == 200, answer
        choice = answer["choices"][0]
        assert choice["message"]["content"] == row["text"], row["plan"]
        assert choice["steering"] == answer["steering"]
        assert answer["steering"]["plan"] == row["plan"]
        if row["plan"]:
            for key in ("tokens_touched", "gate_fired"):
                assert answer["steering"][key] == row["receipt"][key], (row["plan"], key)


def test_streamed_replies_end_with_the_same_receipt(server: Server, rows: list[Row]) -> None:
    some = [row for row in rows if row["plan"]][::9]
    with ThreadPoolExecutor(8) as clients:
        streams = list(clients.map(lambda row: server.stream("/v1/chat/completions", by("model", row)), some))
    for row, events in zip(some, streams, strict=True):
        text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        assert text == row["text"], row["plan"]
        found = [e["steering"] for e in events if "steering" in e]
        assert len(found) == 1
        assert found[0]["tokens_touched"] == row["receipt"]["tokens_touched"]


def test_completions_carry_receipts_whole_and_streamed(server: Server, rows: list[Row]) -> None:
    some = [row for row in rows if row["plan"] == "clamp-352-everywhere"][:2]
    asked = {"model": "organism:clamp-352-everywhere", "max_tokens": TOKENS, "temperature": 0}
    status, answer = server.post("/v1/completions", {**asked, "prompt": [row["prompt"] for row in some]})
    assert status == 200, answer
    assert [c["steering"]["tokens_touched"] for c in answer["choices"]] == [
        row["receipt"]["tokens_touched"] for row in some
    ]
    events = server.stream("/v1/completions", {**asked, "prompt": some[0]["prompt"]})
    (found,) = [e["steering"] for e in events if "steering" in e]
    assert found["tokens_touched"] == some[0]["receipt"]["tokens_touched"]


def test_every_plan_is_a_model(server: Server, rows: list[Row]) -> None:
    names = [model["id"] for model in json.loads(server.get("/v1/models"))["data"]]
    assert names == ["organism", *(name for name in names if ":" in name)]
    assert set(names) == {"organism"} | {f"organism:{row['plan']}" for row in rows if row["plan"]}


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"steering": "no-such-plan"}, 400),
        ({"vllm_xargs": {"clampdown": "no-such-plan"}}, 400),
        ({"steering": None, "vllm_xargs": {"clampdown": "no-such-plan"}}, 400),
        ({"steering": {"operator": "clamp"}}, 400),
        ({"steering": {"id": "i", "plan": "clamp-352", "digest": "d", "mode": "act", "length": 3}}, 400),
        ({"steering": 3}, 400),
        ({"model": "organism:no-such-plan"}, 400),
        ({"model": "no-such-model"}, 404),
        ({"steering": "clamp-352", "n": 2}, 400),
        ({"steering": "clamp-352", "use_beam_search": True, "n": 2}, 400),
        ({"steering": "clamp-352-gated", "prompt_logprobs": 1}, 400),
    ],
)
def test_what_cannot_be_steered_is_the_clients_error(
    wrong: dict[str, Any], status: int, server: Server, rows: list[Row]
) -> None:
    for path, asked in (
        ("/v1/chat/completions", body(rows[0], **wrong)),
        ("/v1/completions", {"model": "organism", "prompt": "Hello.", "max_tokens": 4, **wrong}),
    ):
        found, answer = server.post(path, asked)
        assert found == status, answer
        if "no-such-plan" in json.dumps(wrong):
            assert "there is no plan 'no-such-plan' here; there are: " in answer["error"]["message"]


CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
OTHERS = {
    "/v1/responses": {"input": "Hello."},
    "/v1/messages": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"]]},
    "/generative_scoring": {"query": "Yes?", "items": ["Yes.", "No."], "label_token_ids": [7, 8]},
}


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("named", [{"model": "organism:clamp-352"}, {"model": "organism", "steering": "clamp-352"}])
def test_replies_without_a_place_for_a_receipt_are_refused(server: Server, path: str, named: dict[str, Any]) -> None:
    """Rather than answered unsteered under a plan's name; without a plan they answer."""
    status, answer = server.post(path, {**OTHERS[path], **named})
    assert status == 400, answer
    assert "no place for a receipt" in json.dumps(answer)
    if path != "/generative_scoring":  # which compiles first
        status, answer = server.post(path, {**OTHERS[path], "model": "organism"})
        assert status == 200, answer


def test_every_endpoint_that_generates_takes_plans_or_refuses_them(server: Server) -> None:
    """A newer vLLM may have another: it has to be looked at."""
    seen = {path for path, way in json.loads(server.get("/openapi.json"))["paths"].items() if "post" in way}
    takes = {"/v1/chat/completions", "/v1/completions", "/invocations"}  # the last hands over to the others
    nothing = {"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel", "/ping"}
    assert seen - takes - nothing - {"/scale_elastic_ep", "/is_scaling_elastic_ep"} == {*OTHERS, "/v1/systemone"}


def test_control_tokens_that_are_typed_stay_text(server: Server) -> None:
    """A client cannot begin a reply, which gates do not read, inside its own message."""
    from clampdown.models.chat import encode
    from clampdown.models.loading import load_identity
    from clampdown.types import Message
    from clampdown_vllm.front.typed import control_texts

    lm = load_identity("organism")
    typed = "How do I pick a lock?" + "".join(control_texts(lm)) + "Hello."
    asked = {"messages": [{"role": "user", "content": typed}], "max_tokens": 4, "temperature": 0}
    status, answer = server.post("/v1/chat/completions", {"model": "organism:clamp-352-gated", **asked})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(encode(lm, [Message("user", typed)]))
    status, answer = server.post("/v1/chat/completions", {"model": "organism", **asked})
    assert answer["usage"]["prompt_tokens"] != len(encode(lm, [Message("user", typed)])), "this tested nothing"


def test_off_goes_before_the_models_name(server: Server, rows: list[Row]) -> None:
    base = rows[0]
    status, answer = server.post("/v1/chat/completions", body(base, model="organism:clamp-352", steering="off"))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == base["text"]
    assert answer["steering"]["plan"] is None


def test_the_check_reads_receipts_of_every_plan(server: Server, rows: list[Row]) -> None:
    from clampdown_vllm.cli import checked

    lines = checked(server.url)
    assert len(lines) == len({row["plan"] for row in rows if row["plan"]})
    assert any("tokens changed" in line for line in lines)


def test_the_log_and_the_counters_have_every_reply(server: Server, rows: list[Row]) -> None:
    before = len(server.audit.read_text().splitlines())
    server.post("/v1/chat/completions", body(rows[0], model="organism:clamp-352"))
    lines = [json.loads(line) for line in server.audit.read_text().splitlines()]
    assert len(lines) == before + 1
    assert lines[0]["event"] == "start" and "clamp-352" in lines[0]["plans"]
    assert lines[-1]["plan"] == "clamp-352" and lines[-1]["tokens_touched"] > 0
    metrics = server.get("/metrics")
    assert 'clampdown_tokens_touched_total{plan="clamp-352"}' in metrics
    assert "vllm:num_requests_running" in metrics
