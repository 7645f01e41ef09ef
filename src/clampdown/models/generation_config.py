"""What a model's own `generation_config.json` asks for: honoured, or refused by name.

1. Penalties (`PENALTIES`) change the logits before anything is chosen, so they change greedy replies too. They are the
   library's own processors, in its order, and see the whole prompt: greedy replies are those of its `generate`.
2. Sampling (temperature, `top_p`, `top_k`, `min_p`) is for whoever draws. Explicit greedy decoding ignores it, as the
   library does.
3. What decides nothing here (caches, outputs, lengths, speculation) is accepted. Everything else is an error that names
   the field: a reply that the model's makers did not mean is not given without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import ModelError

# What is honoured without being mentioned (token ids are: see `end_tokens`), and what decides nothing here: how the
# library computes, what it returns, how it speculates, its beams where there are none, and lengths, which a request or
# a command sets.
_NO_EFFECT = {
    "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "do_sample",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "use_mtp",
    "compile_config", "disable_compile", "continuous_batching_config", "renormalize_logits",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "early_stopping", "length_penalty",
    "max_length", "max_new_tokens", "transformers_version", "trust_remote_code", "chat_format", "max_window_size",
}  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OTHER_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
}
"""Fields that are not supported, with the values that ask for nothing. None asks for nothing anywhere."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a penalty is told of the reply: where it begins, and what ends it."""

    n_prompt: int
    eos: list[int]
    device: str


def _library() -> Any:
    from transformers.generation import logits_process  # importing it takes seconds: only when something is generated

    return logits_process


# In the library's order. A new penalty is one row: its field, the values that ask for nothing, the library's processor.
PENALTIES: dict[str, tuple[tuple[Any, ...], Callable[[Any, _Place], Any]]] = {
    "sequence_bias": (({},), lambda value, _: _library().SequenceBiasLogitsProcessor(value)),
    "repetition_penalty": ((1,), lambda value, _: _library().RepetitionPenaltyLogitsProcessor(float(value))),
    "no_repeat_ngram_size": ((0,), lambda value, _: _library().NoRepeatNGramLogitsProcessor(value)),
    "bad_words_ids": (([],), lambda value, at: _library().NoBadWordsLogitsProcessor(value, at.eos)),
    "min_length": ((0,), lambda value, at: _library().MinLengthLogitsProcessor(value, at.eos, device=at.device)),
    "min_new_tokens": (
        (0,),
        lambda value, at: _library().MinNewTokensLengthLogitsProcessor(at.n_prompt, value, at.eos, device=at.device),
    ),
    "exponential_decay_length_penalty": (
        (),
        lambda value, at: _library().ExponentialDecayLengthPenalty(tuple(value), at.eos, at.n_prompt),
    ),
    "suppress_tokens": (([],), lambda value, at: _library().SuppressTokensLogitsProcessor(value, device=at.device)),
    "begin_suppress_tokens": (
        ([],),
        lambda value, at: _library().SuppressTokensAtBeginLogitsProcessor(value, at.n_prompt, device=at.device),
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a generation config asks for. `top_k` 0 keeps every token; `penalties` are (field, value)."""

    draws: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    penalties: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, config: Any, *, greedy: bool = False) -> Asked:
        """Raises `ModelError` for a field that is neither honoured nor harmless. Sampling of any kind is harmless to
        whoever decodes greedily."""
        given = {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}
        penalties = tuple((name, given[name]) for name in PENALTIES if _asks(name, given, PENALTIES[name][0]))
        for name in sorted(given.keys() - _NO_EFFECT - set(_SAMPLING) - set(PENALTIES)):
            if not (greedy and name in _OTHER_SAMPLING) and _asks(
                name, given, {**_NEUTRAL, **_OTHER_SAMPLING}.get(name)
            ):
                raise _refused(name, given[name], "is not supported")
        Penalties(penalties, 1, frozenset({0}), "cpu")  # a value that a penalty cannot take is an error now
        if greedy:
            return cls(penalties=penalties)
        return cls(bool(given.get("do_sample", False)), *_sampling(given), penalties)


def _asks(name: str, given: Mapping[str, Any], neutral: tuple[Any, ...] | None) -> bool:
    return name in given and (neutral is None or given[name] not in neutral)


def _sampling(given: Mapping[str, Any]) -> tuple[float, float, int, float]:
    return (
        _number(given, "temperature", 1.0, lambda value: value > 0),
        _number(given, "top_p", 1.0, lambda value: 0 < value <= 1),
        int(_number(given, "top_k", 0, lambda value: value >= 0 and value == int(value))),
        _number(given, "min_p", 0.0, lambda value: 0 <= value <= 1),
    )


def _number(given: Mapping[str, Any], name: str, usual: float, fits: Callable[[float], bool]) -> float:
    value = given.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise _refused(name, value, "is no such value")
    return float(value)


def _refused(name: str, value: Any, why: str) -> ModelError:
    return ModelError(
        f"the model's generation_config.json asks for {name} = {str(value)[:80]!r}, which {why}",
        hint="without it the replies would not be the model's own; to do without, take the field out of the file",
    )


class Penalties:
    """What changes a row's logits before its next token is chosen, drawn or not."""

    def __init__(
        self, wanted: Sequence[tuple[str, Any]], n_prompt: int, eos_ids: frozenset[int], device: torch.device | str
    ) -> None:
        self._processors = list(_processors(wanted, _Place(n_prompt, sorted(eos_ids), str(device))))

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, history: Sequence[int], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """The logits after `history`: the prompt and what has been written."""
        ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
        scores = logits[None].float()
        for process in self._processors:
            scores = process(ids, scores)
        return scores[0]


def _processors(wanted: Sequence[tuple[str, Any]], place: _Place) -> Iterator[Any]:
    for name, value in wanted:
        try:
            yield PENALTIES[name][1](value, place)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise _refused(name, value, f"is no such value: {error}") from error


def end_tokens(model: Any, tokenizer: Any, of_template: frozenset[int]) -> frozenset[int]:
    """The tokens that end a reply, whoever names them: the generation config, the config, the tokenizer, or the
    template, which writes `of_template` behind an assistant's turn."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    named = [
        getattr(owner, "eos_token_id", None) for owner in (model.generation_config, config, text_config, tokenizer)
    ]
    found = {int(token) for ids in named if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
    return frozenset(found | of_template)
