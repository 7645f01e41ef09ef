"""From a request's body to a job: token ids, a plan, and how to sample. Everything a client can get wrong ends here.

1. Conversations become token ids by the model's own template; texts by its tokenizer; token ids are checked.
2. What is not said is what the model's generation config says: greedy for most models, sampling where it asks for that.
3. A likelihood request (`echo` and `logprobs`, at most one new token) ends with the text that is scored, and generates
   nothing. That text lies after the template's assistant header, where there is one. What a gate reads of it is the
   operator's to say (`Limits.gated_scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clampdown.errors import ChatTemplateError, RequestError
from clampdown.models.chat import encode
from clampdown.models.generation_config import Asked
from clampdown.models.loading import LanguageModel
from clampdown.serving.limits import Limits
from clampdown.serving.plans import Choice, PlanTable
from clampdown.serving.replies import Endpoint
from clampdown.serving.requests import Sampling
from clampdown.serving.schemas import ChatRequest, CompletionRequest
from clampdown.serving.text import starts
from clampdown.types import Message, Prompt


@dataclass(frozen=True, slots=True)
class Prompted:
    """One prompt: its ids, how many of the last ones are a given reply, and what it reads like (for judges)."""

    ids: tuple[int, ...]
    asked: str
    given: int = 0
    echoed: str = ""
    starts: tuple[int, ...] = ()
    """Where each token begins in what is echoed, in characters, for those who want log-probabilities of it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks of the engine: prompts x `n` choices under one plan.

    A `scored` one generates nothing; with `reread` its gate reads what is scored, and with `placeholder` a token was
    asked for after it, which clients cut off unseen. A `raw` prompt was written by the client whole, control tokens and
    all.
    """

    endpoint: Endpoint
    model: str
    choice: Choice
    prompts: tuple[Prompted, ...]
    n: int
    sampling: Sampling
    scored: bool = False
    reread: bool = False
    raw: bool = False
    placeholder: bool = False
    stream: bool = False
    include_usage: bool = False

    @property
    def prompt_of(self) -> tuple[Prompted, ...]:
        """The prompt of each choice, in order of index."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.n))

    def sampling_of(self, index: int) -> Sampling:
        """Choices of one prompt are different draws, the first of them the seed's own."""
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=seed + index % self.n)


@dataclass(frozen=True)
class Intake:
    """Makes jobs of bodies, for one model under the server's limits."""

    lm: LanguageModel
    plans: PlanTable
    limits: Limits
    places: int
    """How many requests the engine can have waiting: it takes all choices of a job or none."""

    def chat(self, body: ChatRequest) -> Job:
        """Raises `RequestError`, `ChatTemplateError` and what a plan's lookup raises."""
        choice = self.plans.choose(body.model, body.steering)
        self._check_choices(body.n or 1)
        messages = [Message(_role(turn.role), turn.text) for turn in body.messages]
        self._check_length(sum(len(message.content) for message in messages), "messages")
        prompt = Prompted(tuple(self._existing(encode(self.lm, messages))), messages[-1].content)
        return self._job(body, "chat", choice, [prompt])

    def text(self, body: CompletionRequest) -> Job:
        """Raises `RequestError` and what a plan's lookup raises."""
        if not self.limits.raw:
            raise RequestError(
                "this server takes conversations only: /v1/chat/completions", status=403, code="raw_disabled"
            )
        choice = self.plans.choose(body.model, body.steering)
        if not body.prompts:
            raise RequestError("there is no prompt in the list", param="prompt", code="empty_prompt")
        self._check_choices(len(body.prompts) * (body.n or 1))
        for given in body.prompts:
            self._check_length(len(given), "prompt", 1 if isinstance(given, list) else None)
        return self._job(body, "text", choice, [self._prompted(given, body) for given in body.prompts])

    def _job(
        self, body: ChatRequest | CompletionRequest, endpoint: Endpoint, choice: Choice, prompts: list[Prompted]
    ) -> Job:
        scored = _is_scored(body)
        reread = self._reread(body, choice) if isinstance(body, CompletionRequest) else False
        return Job(
            endpoint=endpoint,
            model=body.model,
            choice=choice,
            prompts=tuple(prompts),
            n=body.n or 1,
            sampling=self._sampling(body, max(len(prompt.ids) for prompt in prompts)),
            scored=scored,
            reread=reread,
            raw=endpoint == "text",
            placeholder=scored and body.limit == 1,
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    def _reread(self, body: CompletionRequest, choice: Choice) -> bool:
        """Whether a gate reads what is scored. Raises `RequestError` where the operator does not want it scored."""
        if not (body.echo and body.logprobs is not None and choice.plan is not None and choice.plan.gates):
            return False
        if self.limits.gated_scoring == "off":
            raise RequestError(
                "this server gives no log-probabilities of prompts under plans with a gate",
                status=403,
                code="scoring_disabled",
                param="echo",
            )
        if not _is_scored(body):
            raise RequestError(
                "under a plan with a gate, `echo` with `logprobs` scores a text and generates nothing",
                code="scores_or_generates",
                param="max_tokens",
            )
        return self.limits.gated_scoring == "read"

    def _check_choices(self, asked: int) -> None:
        most = min(self.limits.choices, self.places)
        if asked > most:
            raise RequestError(
                f"{asked} choices in one request; this server gives at most {most} (prompts x n)",
                code="too_many_choices",
                param="n",
            )

    def _check_length(self, size: int, param: str, longest: int | None = None) -> None:
        """Refuse a text that no tokens could make fit, before it is turned into tokens. `longest` is the most that a
        token holds of what `size` counts; by default characters, as the vocabulary has them."""
        positions = self._positions
        if positions is None or size <= positions or size <= positions * (longest or self._longest_token):
            return
        raise RequestError(
            f"{size} {'tokens' if longest else 'characters'} do not fit into the model's {positions} positions",
            param=param,
            code="context_length_exceeded",
        )

    @property
    def _positions(self) -> int | None:
        found = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token; its name has at least as many as its text."""
        return max(map(len, self.lm.tokenizer.get_vocab()))

    def _prompted(self, given: str | list[int], body: CompletionRequest) -> Prompted:
        tokenizer: Any = self.lm.tokenizer
        if isinstance(given, str):
            ids = self._existing(self._tokenized(given))
            text = given
        else:
            ids = self._existing(given)
            text = tokenizer.decode(ids, skip_special_tokens=False)
        if not ids:
            raise RequestError("a prompt is empty", param="prompt", code="empty_prompt")
        reply = given_reply(self.lm, ids) if _is_scored(body) else 0
        starts = self._starts(given, ids) if body.echo and body.logprobs is not None else ()
        return Prompted(tuple(ids), text, reply, text if body.echo else "", starts)

    def _starts(self, given: str | list[int], ids: Sequence[int]) -> tuple[int, ...]:
        """Where tokens begin in the text that is echoed."""
        tokenizer: Any = self.lm.tokenizer
        if not isinstance(given, str):
            return starts(lambda some: tokenizer.decode(some, skip_special_tokens=False), ids)
        encoded = tokenizer(given, add_special_tokens=self._unmarked(given), return_offsets_mapping=True)
        return spans_to_starts(encoded["offset_mapping"])

    def _unmarked(self, text: str) -> bool:
        """A text that opens with the begin-of-text mark was written by a template: it is not marked again."""
        bos = self.lm.tokenizer.bos_token
        return not (bool(bos) and text.startswith(str(bos)))

    def _tokenized(self, text: str) -> list[int]:
        tokenizer: Any = self.lm.tokenizer
        return list(tokenizer.encode(text, add_special_tokens=self._unmarked(text)))

    def _existing(self, ids: Sequence[int]) -> list[int]:
        """Tokens for which the model has a row, wherever they come from: tokenizers can know more than it."""
        size = int(self.lm.model.get_input_embeddings().num_embeddings)
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} does not exist: the model has {size}", code="no_such_token")
        return list(ids)

    def _sampling(self, body: ChatRequest | CompletionRequest, longest: int) -> Sampling:
        usual = Asked.of(self.lm.model.generation_config)
        return Sampling(
            max_tokens=self._max_tokens(body, longest),
            temperature=(usual.temperature if usual.draws else 0.0) if body.temperature is None else body.temperature,
            top_p=usual.top_p if body.top_p is None else body.top_p,
            top_k=usual.top_k if body.top_k is None else max(body.top_k, 0),
            min_p=usual.min_p if body.min_p is None else body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            stop=body.stops,
            top_logprobs=body.alternatives,
        )

    def _max_tokens(self, body: ChatRequest | CompletionRequest, longest: int) -> int:
        """What was asked for, or what there is room for. A prompt that leaves no room is an error."""
        scored, limits = _is_scored(body), self.limits
        asked = 0 if scored else body.limit
        if asked is not None and asked > limits.tokens:
            raise RequestError(
                f"max_tokens is {asked}; this server writes at most {limits.tokens}",
                param="max_tokens",
                code="too_long",
            )
        if asked == 0 and not scored:
            raise RequestError("max_tokens 0 is for `echo` with `logprobs`", param="max_tokens", code="nothing_to_do")
        positions = self._positions
        room = limits.tokens if positions is None else positions - longest
        wanted = min(limits.default_tokens, limits.tokens, max(room, 1)) if asked is None else asked
        if wanted > room:
            raise RequestError(
                f"the model has {positions} positions: {longest} of the prompt and {wanted} to write do not fit",
                param="max_tokens" if room > 0 else "messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return wanted


def _is_scored(body: ChatRequest | CompletionRequest) -> bool:
    """Whether likelihoods of the prompt's own end are asked for, and no text to speak of."""
    if not isinstance(body, CompletionRequest) or not body.echo or body.logprobs is None:
        return False
    return body.max_tokens is not None and body.max_tokens <= 1


def spans_to_starts(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Where tokens begin, from the tokenizer's own spans. Those may leave out a blank that belongs to its token, are
    the same for all tokens of a character, and (0, 0) for marks that are not in the text."""
    found, end = [], 0
    for begin, stop in spans:
        found.append(end if stop == 0 else min(begin, end))
        end = max(end, stop)
    return tuple(found)


def given_reply(lm: LanguageModel, ids: Sequence[int]) -> int:
    """How many tokens follow the template's last assistant header; 0 where there is none or another turn follows."""
    try:
        header, special = lm.chat.generation_prompt, lm.chat.special_ids
    except ChatTemplateError:
        return 0
    starts = range(len(ids) - len(header), -1, -1)
    at = next((i for i in starts if tuple(ids[i : i + len(header)]) == header), None)
    reply = [] if at is None else ids[at + len(header) :]
    return 0 if any(token in special for token in reply) else len(reply)


def _role(role: str) -> Any:
    return "system" if role == "developer" else role


def judged_as(asked: str) -> Prompt:
    """What a judge is told of a prompt."""
    return Prompt("request", (Message("user", asked),), "served")
