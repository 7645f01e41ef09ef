"""What a request asks of steering, as vLLM's SamplingParams carry it, and how an order is put into them.

Also what both engines do alike: a request's course, the workers' answers as one, and how long a reply is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from clampdown.errors import SteeringNotAppliedError
from clampdown_vllm.front.desk import OFF, Course, Desk, Unknown
from clampdown_vllm.order import Order
from clampdown_vllm.settings import KEY


def asked(params: Any) -> str | None:
    """The plan that `extra_args` names; None for no plan. Requests that have their order already are made by the front
    ends and go past this: an order that comes from outside is nobody's.

    Raises `VLLMValidationError`, which is a 400.
    """
    given = (getattr(params, "extra_args", None) or {}).get(KEY)
    if given is None or given == OFF:
        return None
    if not isinstance(given, str):
        raise refused(Unknown(f"steering is the name of a plan, not {type(given).__name__}"))
    return given


def refuse_unsteerable(desk: Desk | None, name: str, params: SamplingParams) -> Desk:
    """Raises `VLLMValidationError` for what a plan cannot be combined with."""
    if desk is None:
        raise refused(Unknown(f"this engine serves no plans, and '{name[:80]}' was asked for"))
    plan = _or_400(desk, name)
    if params.n != 1:
        raise refused(Unknown("one choice per steered request: n must be 1"))
    if plan.gates and params.prompt_logprobs is not None:
        raise refused(
            Unknown("log-probabilities of a prompt's own tokens would show what a gate keeps: not under this plan")
        )
    return desk


def _or_400(desk: Desk, name: str) -> Any:
    try:
        return desk.plan(name)
    except Unknown as error:
        raise refused(error) from error


def refused(error: Unknown) -> VLLMValidationError:
    return VLLMValidationError(error.message, parameter="steering")


def with_order(params: SamplingParams, order: Order | None) -> SamplingParams:
    """A copy that carries the order, or none."""
    extra = {key: value for key, value in (params.extra_args or {}).items() if key != KEY}
    new = params.clone()
    new.extra_args = {**extra, KEY: order.plain()} if order is not None else extra or None
    if order is not None and order.reads:
        new.skip_reading_prefix_cache = True
    return new


def one_token(order: Order) -> SamplingParams:
    """For passes that are made for their prompt alone."""
    kind = RequestOutputKind.FINAL_ONLY
    return with_order(SamplingParams(temperature=0.0, max_tokens=1, output_kind=kind, detokenize=False), order)


def ids_of(prompt: Any) -> Sequence[int]:
    """The token ids of a rendered prompt. Raises `VLLMValidationError` for prompts that are more than tokens."""
    if isinstance(prompt, Mapping) and prompt.get("type", "token") == "token" and "prompt_token_ids" in prompt:
        return prompt["prompt_token_ids"]
    raise refused(Unknown("only prompts of text or token ids can be steered"))


def course_of(desk: Desk, name: str, prompt: Any, params: Any) -> Course:
    try:
        return desk.course(name, ids_of(prompt), scored=params.prompt_logprobs is not None)
    except Unknown as error:
        raise refused(error) from error


def merged(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every rank of a tensor-parallel model keeps the same receipts; one that decided otherwise is an error."""
    for answer in answers[1:]:
        for id_, found in answer.items():
            first = answers[0][id_]
            if (found and found["fired"]) != (first and first["fired"]):
                raise SteeringNotAppliedError("two ranks of the model did not do the same")
    return dict(answers[0])


def written_of(out: Any, params: Any, before: int) -> int:
    """How many tokens the reply has."""
    n = len(out.outputs[0].token_ids)
    return before + n if params.output_kind == RequestOutputKind.DELTA else n
