"""Inspect evaluates a steered model: `inspect eval TASK --model clampdown/PLAN`, PLAN a plan.toml or `baseline`.

1. Requests wait a moment for one another: those with the same settings are decoded in one batch, by one thread, because
   steering belongs to the thread that runs the model.
2. Settings that would be ignored, tools, and pictures are errors: a score must be of the task that was asked for.
3. A refusal is a text like another, unless `-M refusals=JUDGE` says who tells: then it stops with `content_filter`.
   Inspect counts that as a refusal and, with `--fail-on-refusal`, fails the sample for it.
4. The receipt is in the output's metadata, with the plan's digest: per sample, in the log.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import anyio

from clampdown.errors import ModelError
from clampdown.extras import extra
from clampdown.interop.steered import Completion, Decoding, SteeredModel, load_steered
from clampdown.models.chat import encode
from clampdown.study.judging import judge_named
from clampdown.types import Message, Prompt, Verdict

with extra("inspect", "the model of Inspect"):
    from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo  # pyright: ignore[reportMissingImports]

BASELINE = "baseline"
DEFAULT_MAX_TOKENS = 512
_GATHER_SECONDS = 0.02

# What a config may hold: the settings that act here, and those about the client rather than the answer.
_ACT = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop_seqs"}
_ABOUT_THE_CLIENT = {
    "max_retries", "timeout", "attempt_timeout", "max_connections", "adaptive_connections", "system_message",
    "batch", "cache", "cache_prompt", "stream_idle_timeout", "parallel_tool_calls", "max_tool_output",
    "internal_tools", "reasoning_history", "fail_on_refusal",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on its way to the model's thread."""

    prompt: tuple[int, ...]
    decoding: Decoding
    result: Future[Completion]


class Batcher:
    """One thread that runs the model; requests that come together are answered together."""

    def __init__(self, model: SteeredModel) -> None:
        self._model = model
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], decoding: Decoding) -> Future[Completion]:
        job = _Job(tuple(prompt), decoding, Future())
        self._jobs.put(job)
        return job.result

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            groups: dict[Decoding, list[_Job]] = {}
            for job in (first, *self._waiting()):
                groups.setdefault(job.decoding, []).append(job)
            for decoding, jobs in groups.items():
                self._answer(decoding, jobs)

    def _waiting(self) -> Iterator[_Job]:
        """Whatever comes within a moment of the request before it, up to a batch."""
        for _ in range(self._model.batch_rows - 1):
            try:
                job = self._jobs.get(timeout=_GATHER_SECONDS)
            except queue.Empty:
                return
            if job is None:
                self._jobs.put(None)  # the end: for the loop to see
                return
            yield job

    def _answer(self, decoding: Decoding, jobs: Sequence[_Job]) -> None:
        try:
            found = self._model.complete([job.prompt for job in jobs], decoding)
        except BaseException as error:  # to whoever asked: this thread must go on
            for job in jobs:
                job.result.set_exception(error)
            return
        for job, completion in zip(jobs, found, strict=True):
            job.result.set_result(completion)


class SteeredAPI(ModelAPI):
    """A model under a plan. `-M` arguments: `model`, `sae`, `device`, `dtype`, `batch_rows`, `refusals`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        refusals = model_args.pop("refusals", None)
        self._refusals = None if refusals is None else judge_named(str(refusals))
        unknown = model_args.keys() - {"model", "sae", "device", "dtype", "batch_rows"}
        if unknown:
            raise ModelError(
                f"model argument '{min(unknown)}' is not known",
                hint="-M model, sae, device, dtype, batch_rows, refusals",
            )
        self.steered = load_steered(plan=None if model_name == BASELINE else model_name, **model_args)
        self._batcher = Batcher(self.steered)
        self._limiter = anyio.CapacityLimiter(4 * self.steered.batch_rows)

    def max_connections(self) -> int:
        """As many samples at once as a batch has rows."""
        return self.steered.batch_rows

    def max_tokens(self) -> int | None:
        return DEFAULT_MAX_TOKENS

    def connection_key(self) -> str:
        return f"clampdown/{self.model_name}"

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One reply. Raises `ModelError` for what cannot be done, `SteeringNotAppliedError` and its kin."""
        if tools:
            raise ModelError(f"tool '{tools[0].name}' was offered, and this provider calls no tools")
        if config.model_dump().get("fail_on_refusal") and self._refusals is None:
            raise ModelError(
                "fail_on_refusal would do nothing: nobody tells refusals", hint="-M refusals=rules, or another judge"
            )
        turns = tuple(_message(turn) for turn in input)
        prompt = encode(self.steered.lm, turns)
        decoding = _decoding(config, self._room(len(prompt)))
        future = self._batcher.submit(prompt, decoding)
        completion = await anyio.to_thread.run_sync(future.result, limiter=self._limiter)
        refused = self._refusals is not None and await anyio.to_thread.run_sync(self._refused, turns, completion.text)
        return self._output(completion, len(prompt), refused=refused)

    def _refused(self, turns: tuple[Message, ...], reply: str) -> bool:
        assert self._refusals is not None
        return self._refusals(Prompt("request", turns, "requests"), reply).verdict is Verdict.REFUSED

    def _room(self, prompt: int) -> int:
        positions = int(self.steered.lm.model.config.max_position_embeddings)
        if prompt >= positions:
            raise ModelError(f"a prompt of {prompt} tokens does not fit into {positions} positions")
        return positions - prompt

    def _output(self, completion: Completion, n_prompt: int, *, refused: bool) -> ModelOutput:
        message = ChatMessageAssistant(content=completion.text, model=self.model_name, source="generate")
        ended = "stop" if completion.why == "stop" else "max_tokens"
        reason = "content_filter" if refused else ended
        receipt = None if completion.receipt is None else asdict(completion.receipt)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=n_prompt,
                output_tokens=completion.n_tokens,
                total_tokens=n_prompt + completion.n_tokens,
            ),
            metadata={"clampdown": {**self.steered.description, "receipt": receipt}},
        )

    async def aclose(self) -> None:
        self._batcher.close()


def _message(turn: ChatMessage) -> Message:
    """A turn as text. Raises `ModelError` for tool results and for content that is no text."""
    if turn.role not in ("system", "user", "assistant"):
        raise ModelError(f"a '{turn.role}' turn cannot be given to this model")
    if not isinstance(turn.content, str) and any(part.type != "text" for part in turn.content):
        raise ModelError("this provider reads text, and a message holds something else")
    return Message(turn.role, turn.text)


def _decoding(config: GenerateConfig, room: int) -> Decoding:
    """Generation settings. Raises `ModelError` for one that would be ignored."""
    asked = config.model_dump(exclude_none=True)
    ignored = sorted(asked.keys() - _ACT - _ABOUT_THE_CLIENT)
    if ignored and not (ignored == ["num_choices"] and config.num_choices == 1):
        raise ModelError(f"the setting '{ignored[0]}' would be ignored", hint=f"settings that act: {sorted(_ACT)}")
    temperature = config.temperature or 0.0
    return Decoding(
        max_new_tokens=min(config.max_tokens or DEFAULT_MAX_TOKENS, room),
        stops=tuple(config.stop_seqs or ()),
        temperature=temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k,
        seed=config.seed if temperature else None,
    )
