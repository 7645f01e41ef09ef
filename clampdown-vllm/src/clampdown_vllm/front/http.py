"""vLLM's OpenAI-compatible server: plans by model name, by the field `steering` or by `vllm_xargs`, and receipts.

Every plan is listed as a model `BASE:plan`. The field goes before `vllm_xargs`, and both before the model's name; "off"
means no plan. A receipt stands in the reply, streamed or not, as `steering`. Endpoints whose replies have no place for
one refuse plans.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

from clampdown.errors import SteeringNotAppliedError
from clampdown.serving.replies import agreed
from clampdown_vllm.front.async_engine import prove
from clampdown_vllm.front.configuring import DESKS, desk_of
from clampdown_vllm.front.desk import OFF, Desk, Unknown
from clampdown_vllm.front.requests import asked, refuse_unsteerable, refused
from clampdown_vllm.front.typed import plain_ids
from clampdown_vllm.runners.patching import wrap
from clampdown_vllm.settings import KEY

NO_PLACE = "replies of this endpoint have no place for a receipt: use /v1/chat/completions"

_TAKES_PLANS = ("OpenAIServingChat", "OpenAIServingCompletion", "ServingTokenization")
"""Classes that answer with a receipt, and one that generates nothing. What derives from them answers otherwise."""

_PLACE: ContextVar[bool] = ContextVar("a reply with a place for a receipt", default=False)


def install() -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.entrypoints.serve.engine.serving import BaseServing

    wrap(OpenAIServingModels, "__init__", _list_plans)
    wrap(BaseServing, "_check_model", _check_model)
    wrap(AnthropicServingMessages, "create_messages", _from_body)
    if find_spec("cohere"):  # without that package vLLM has no such endpoint
        from vllm.entrypoints.cohere.serving import CohereServingChatV2

        wrap(CohereServingChatV2, "create_chat_v2", _from_body)
    wrap(ServingTokens, "serve_tokens", _from_body)
    wrap(OpenAIServingModels, "init_static_loras", _start)
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _to_sampling_params)
    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _to_beam_search_params)
    wrap(OpenAIServingChat, "create_chat_completion", _placed(OpenAIServingChat))
    wrap(OpenAIServingCompletion, "create_completion", _placed(OpenAIServingCompletion))
    wrap(OpenAIServingChat, "render_chat_request", _render)
    wrap(OpenAIServingChat, "chat_completion_full_generator", _chat_whole)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", _chat_stream)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _text_whole)
    wrap(OpenAIServingCompletion, "completion_stream_generator", _text_stream)


async def _start(before: Any, self: Any) -> None:
    """The last step before a server takes requests: one that cannot steer does not come that far."""
    await prove(self.engine_client)
    await before(self)


# ---- names -------------------------------------------------------------------------------------------------------


def _list_plans(before: Any, self: Any, engine_client: Any, base_model_paths: Any, **kwargs: Any) -> None:
    before(self, engine_client, base_model_paths, **kwargs)
    desk = desk_of(engine_client.vllm_config)
    if desk is not None:
        bases = list(self.base_model_paths)
        desk.bases = tuple(base.name for base in bases)
        for base in bases:
            for name in desk.book.plans:
                if f"{base.name}:{name}" in desk.bases:
                    raise SteeringNotAppliedError(
                        f"a model is served as '{base.name}:{name}', which names a plan",
                        hint="serve it, or the plan, by another name",
                    )
                self.base_model_paths.append(type(base)(name=f"{base.name}:{name}", model_path=base.model_path))


def _desk() -> Desk | None:
    """Of the one engine that this process serves."""
    return next(reversed(DESKS.values()), None)


def requested(request: Any, extra: Mapping[str, Any] | None) -> Any:
    """What a request says of steering: the field, `vllm_xargs`, or its model's name; None when it says nothing."""
    given = (request.model_extra or {}).get("steering")  # clients send fields that are not set as null
    given = (extra or {}).get(KEY) if given is None else given
    desk = _desk()
    return _in_name(desk, request.model or "") if given is None and desk is not None else given


def _in_name(desk: Desk, model: str) -> str | None:
    """The plan in a model's name; None for the models themselves and for names of something else."""
    if model in desk.bases:
        return None
    return next((model[len(base) + 1 :] for base in desk.bases if model.startswith(f"{base}:")), None)


async def _check_model(before: Any, self: Any, request: Any) -> Any:
    """Every endpoint that takes a model's name asks this first. One whose replies have no place for a receipt takes no
    plan by any name: some of them never come to `to_sampling_params`, and would answer unsteered. vLLM answers 404 to
    a model that it does not serve; a name that begins with one that it does means a plan, and that is a 400."""
    desk = _desk()
    if desk is None:
        return await before(self, request)
    if requested(request, _extra(request)) not in (None, OFF) and type(self).__name__ not in _TAKES_PLANS:
        return self.create_error_response(NO_PLACE, param="steering")
    error, name = await before(self, request), _in_name(desk, request.model or "")
    if error is None or name is None or name in desk.book.plans:
        return error
    return self.create_error_response(desk.missing(name), param="model")


async def _from_body(before: Any, self: Any, request: Any, raw_request: Any = None, **kwargs: Any) -> Any:
    """Endpoints whose requests drop fields that they do not know: what was asked for stands in the body alone."""
    body = await raw_request.json() if raw_request is not None and _desk() is not None else {}
    if any(given not in (None, OFF) for given in (body.get("steering"), (body.get("vllm_xargs") or {}).get(KEY))):
        return self.create_error_response(NO_PLACE, param="steering")
    return await before(self, request, raw_request, **kwargs)


def _extra(request: Any) -> Mapping[str, Any] | None:
    given = getattr(request, "vllm_xargs", None)
    return given if given is not None else getattr(getattr(request, "sampling_params", None), "extra_args", None)


def _to_sampling_params(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    params = before(self, *args, **kwargs)
    given = requested(self, params.extra_args)
    if given is not None and not isinstance(given, str):
        raise refused(Unknown(f"steering is the name of a plan, not {type(given).__name__}"))
    extra = {key: value for key, value in (params.extra_args or {}).items() if key != KEY}
    params.extra_args = {**extra, KEY: given} if given not in (None, OFF) else extra or None
    if (name := asked(params)) is not None:
        if not _PLACE.get():
            raise refused(Unknown(NO_PLACE))
        refuse_unsteerable(_desk(), name, params)
    return params


def _to_beam_search_params(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if requested(self, getattr(self, "vllm_xargs", None)) not in (None, OFF):
        raise refused(Unknown("beam search cannot be steered"))
    return before(self, *args, **kwargs)


def _placed(cls: Any) -> Any:
    """Inside these calls a reply has a place for a receipt; classes derived from them answer in other shapes."""

    async def around(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _PLACE.set(type(self) is cls)
        try:
            return await before(self, *args, **kwargs)
        finally:
            _PLACE.reset(token)

    return around


async def _render(before: Any, self: Any, request: Any) -> Any:
    """The prompt of a steered conversation, in which nothing that was typed is a control token."""
    result = await before(self, request)
    desk = _desk()
    if desk is None or not isinstance(result, tuple) or requested(request, request.vllm_xargs) in (None, OFF):
        return result
    try:
        ids = plain_ids(desk.lm, desk.controls, request)
    except Unknown as error:
        raise refused(error) from error
    if ids is not None:
        for rendered in result[1]:
            rendered["prompt_token_ids"] = ids
            rendered.pop("prompt", None)
    return result


# ---- receipts ----------------------------------------------------------------------------------------------------


class _Tap:
    """Passes an engine's outputs on, and keeps the receipts that come with the last of each prompt."""

    def __init__(self, outputs: AsyncIterator[Any], *, raw: bool) -> None:
        self._outputs, self._raw = outputs, raw
        self.receipts: dict[int, dict[str, Any] | None] = {}

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        async for item in self._outputs:
            index, out = item if isinstance(item, tuple) else (0, item)
            if out.finished:
                self.receipts[index] = receipt_of(out, raw=self._raw)
            yield item


def receipt_of(out: Any, *, raw: bool) -> dict[str, Any]:
    """What was done to a reply; without a plan, that nothing was. `raw`: the client wrote the prompt itself."""
    nothing = {"plan": None, "digest": None, "tokens_touched": 0, "edit_norm": 0.0, "branch": "none"}
    return {**getattr(out, "steering", nothing), "raw": raw}


async def _chat_whole(before: Any, self: Any, request: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    tap = _Tap(outputs, raw=False)
    response = await before(self, request, aiter(tap), *args, **kwargs)
    return _answered(response, request, [tap.receipts.get(0)])


def _text_whole(before: Any, self: Any, batch: Sequence[Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    response = before(self, batch, request, *args, **kwargs)
    return _answered(response, request, [receipt_of(out, raw=True) for out in batch for _ in out.outputs])


def _answered(response: Any, request: Any, receipts: Sequence[dict[str, Any] | None]) -> Any:
    """The receipt at the top and in each choice, and the name that was asked for."""
    if _desk() is None or not hasattr(response, "choices"):
        return response
    known = [receipt for receipt in receipts if receipt is not None]
    for choice, receipt in zip(response.choices, receipts, strict=False):
        choice.steering = receipt
    if known:
        response.steering = agreed(known)
    response.model = request.model or response.model
    return response


async def _chat_stream(before: Any, self: Any, request: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    tap = _Tap(outputs, raw=False)
    async for line in _with_receipts(before(self, request, aiter(tap), *args, **kwargs), tap, 1):
        yield line


async def _text_stream(
    before: Any, self: Any, request: Any, inputs: Any, outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    tap = _Tap(outputs, raw=True)
    n = request.n or 1
    async for line in _with_receipts(before(self, request, inputs, aiter(tap), *args, **kwargs), tap, n):
        yield line


async def _with_receipts(lines: AsyncIterator[str], tap: _Tap, n: int) -> AsyncGenerator[str, None]:
    """A stream's events, the receipt in the one that says why the reply ended."""
    async for line in lines:
        yield _with_receipt(line, tap, n) if '"finish_reason":"' in line and _desk() is not None else line


def _with_receipt(line: str, tap: _Tap, n: int) -> str:
    try:
        event = json.loads(line.removeprefix("data: "))
    except ValueError:
        return line
    for choice in event.get("choices", ()):
        receipt = tap.receipts.get(choice["index"] // n)
        if choice.get("finish_reason") and receipt is not None:
            choice["steering"] = event["steering"] = receipt
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
