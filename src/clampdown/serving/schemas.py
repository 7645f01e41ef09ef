"""What a client may send: OpenAI's request bodies, and the extra field `steering`.

A field that would change the answer and cannot be honoured is an error, never ignored. Fields that only name or file a
request (`user`, `metadata`, ...) are accepted and have no effect. Values that are no numbers (NaN, infinity) and
integers beyond 64 bits are refused here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from clampdown.errors import RequestError

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_INLINE_FEATURES = 8
_LARGEST = 2**63 - 1

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, le=_LARGEST, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of the contract that are not supported, with the values that ask for nothing."""
_NO_EFFECT_IN_MESSAGES = ("cache_control",)
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "prefix": (False,),
    "refusal": ("",),
    "tool_calls": ([],),
}
"""The same for fields of messages and their parts. Clients send an answer's own back as it came."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class InlineEdit(_Body):
    """One edit given in the request: these features, pushed this far. `strength` is in raw activation units, `multiple`
    in multiples of each feature's 99th percentile on the server's calibration prompts; one of the two."""

    feature: Annotated[int, Field(ge=0, le=_LARGEST, strict=True)] | None = None
    features: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_INLINE_FEATURES)] | None = None
    operator: Literal["clamp", "clamp_active", "floor", "scale", "add"] = "clamp"
    strength: Finite | None = None
    multiple: Finite | None = None
    scope: Literal["all", "prompt", "generated", "assistant", "last_user"] = "all"
    site: Name | None = None
    gate: Name | None = Field(default=None, description="The name of a plan whose gate decides.")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.feature is None) == (self.features is None):
            raise ValueError("give `feature` or `features`")
        if (self.strength is None) == (self.multiple is None):
            raise ValueError("give `strength` (raw units) or `multiple` (of the feature's 99th percentile)")
        if self.operator == "scale" and self.strength is None:
            raise ValueError("the strength of 'scale' is a factor: give `strength`")
        return self

    @property
    def indices(self) -> tuple[int, ...]:
        return (self.feature,) if self.feature is not None else tuple(self.features or ())


class StreamOptions(_Body):
    """What a stream says beside its text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


def _closed(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document which further fields are taken, and with which values."""
    neutral = {name: {"enum": [*values, None]} for name, values in _NEUTRAL.items()}
    schema["properties"] |= {name: {} for name in _NO_EFFECT} | neutral
    schema["additionalProperties"] = False


class _Common(_Body):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, json_schema_extra=_closed)

    model: Name = Field(description="The model's name, or NAME:PLAN to steer with a plan.")
    steering: Name | InlineEdit | None = Field(default=None, description='A plan\'s name, "off", or an edit.')
    max_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_LARGEST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    seed: Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] | None = None
    stop: Stop | list[Stop | None] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str | None] | None) -> str | list[str | None] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        return value

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in _NO_EFFECT or value is None:
                continue
            if name not in _NEUTRAL:
                raise RequestError(f"there is no field {name[:100]!r}", code="unknown_parameter", param=name[:100])
            if value not in _NEUTRAL[name]:
                raise RequestError(f"'{name}' is not supported here", code="unsupported_parameter", param=name)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Clients send nulls in lists of stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _closed_part(schema: dict[str, Any]) -> None:
    """As `_closed`, for what stands inside messages."""
    schema["properties"] |= {name: {"enum": [*values, None]} for name, values in _NEUTRAL_IN_MESSAGES.items()}
    schema["properties"] |= {name: {} for name in _NO_EFFECT_IN_MESSAGES}
    schema["additionalProperties"] = False


class _InMessage(BaseModel):
    model_config = ConfigDict(extra="allow", json_schema_extra=_closed_part)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            where = f"messages.{name[:100]}"
            if name in _NO_EFFECT_IN_MESSAGES or value is None:
                continue
            if name not in _NEUTRAL_IN_MESSAGES:
                raise RequestError(f"messages have no field {name[:100]!r}", code="unknown_parameter", param=where)
            if value not in _NEUTRAL_IN_MESSAGES[name]:
                raise RequestError(
                    f"'{name}' in a message is not supported here", code="unsupported_parameter", param=where
                )
        return self


class TextPart(_InMessage):
    """A piece of a message's content. Only text can be read."""

    type: Literal["text"]
    text: Text


class ChatMessage(_InMessage):
    """One turn. `developer` is what `system` is called for some models. Every turn has content: what would stand in an
    assistant's place of it (calls of tools, a refusal's own field) cannot be read here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000)]

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class ChatRequest(_Common):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        return self

    @property
    def size(self) -> int:
        """Characters to be read, and as much again for every turn as a short one has."""
        return sum(len(turn.text) + 64 for turn in self.messages)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Common):
    """Body of /v1/completions. A prompt is a text or a list of token ids; a list of either is several prompts."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("`echo` with `logprobs` cannot be streamed")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        several = isinstance(given, list) and (not given or not isinstance(given[0], int))
        return list(given) if several else [given]

    @property
    def size(self) -> int:
        """Characters or tokens to be read."""
        return sum(map(len, self.prompts))

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to each token; None for no log-probabilities at all."""
        return self.logprobs
