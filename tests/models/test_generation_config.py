"""A model's generation config is honoured as the library honours it, or refused by name; replies end at every end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from clampdown.config import embedded_model
from clampdown.errors import ModelError
from clampdown.models.chat import ChatFormat, encode
from clampdown.models.generation import generate, reply_text
from clampdown.models.generation_config import Asked, Penalties, end_tokens
from clampdown.models.loading import LanguageModel, load_model
from clampdown.replies import answer_of
from clampdown.types import Message
from tests.models.test_chat import STYLES, TOKENIZERS
from tests.models.test_templates import ALWAYS, THINKS, speak

Tiny = Callable[[str], LanguageModel]
NEW = 16
CHANGES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 9]]},
    {"suppress_tokens": list(range(3, 40))},
    {"begin_suppress_tokens": list(range(3, 50))},
    {"min_new_tokens": 9},
    {"min_length": 14},
    {"sequence_bias": [[[11], 4.0], [[12, 13], -4.0]]},
    {"exponential_decay_length_penalty": [3, 1.5]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": [4]},
]


@pytest.mark.parametrize("asked", CHANGES, ids=lambda asked: "+".join(asked))
def test_greedy_replies_are_the_librarys_under_every_penalty(
    asked: dict[str, Any], tiny: Tiny, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny("llama")
    few = sorted(prompts, key=lambda prompt: len(generate(lm, [prompt], max_new_tokens=NEW)[0].ids))[:6]
    plain = [reply.ids for reply in generate(lm, few, max_new_tokens=NEW)]
    config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **asked)
    monkeypatch.setattr(lm.model, "generation_config", config)
    ours = generate(lm, few, max_new_tokens=NEW)
    for prompt, reply in zip(few, ours, strict=True):
        ids = torch.tensor([prompt])
        row = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)[0]
        written = row[len(prompt) :].tolist()
        assert list(reply.ids) == (written[: written.index(2)] if 2 in written else written)
    assert [reply.ids for reply in ours] != plain or "exponential_decay_length_penalty" in asked


@pytest.mark.parametrize(
    "asked",
    [
        *({"num_beams": 4}, {"guidance_scale": 1.5}, {"penalty_alpha": 0.6}, {"forced_eos_token_id": 2}),
        *({"stop_strings": ["x"]}, {"max_time": 3.0}, {"presence_penalty": 1.5}, {"a_new_one": 1}, {"typical_p": 0.9}),
        *({"epsilon_cutoff": 0.1}, {"repetition_penalty": -1.0}, {"no_repeat_ngram_size": -2}, {"top_k": 2.5}),
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_not_honoured_is_refused_by_name(asked: dict[str, Any]) -> None:
    config = GenerationConfig()
    vars(config).update(asked)
    with pytest.raises(ModelError, match=f"asks for {next(iter(asked))} = "):
        Asked.of(config)
    if "typical_p" not in asked and "epsilon_cutoff" not in asked and "top_k" not in asked:
        with pytest.raises(ModelError, match=next(iter(asked))):
            Asked.of(config, greedy=True)


def test_sampling_is_nothing_to_greedy_decoding_and_neutral_values_to_anybody() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, typical_p=1.0)
    vars(config).update(num_beams=1, guidance_scale=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True)
    assert Asked.of(config) == Asked(True, 0.7, 0.8, 20, 0.1)
    assert Asked.of(config, greedy=True) == Asked()
    assert Asked.of(GenerationConfig()) == Asked()


def test_no_penalty_is_no_change() -> None:
    nothing = Penalties((), 3, frozenset({2}), "cpu")
    logits = torch.randn(8)
    assert not nothing and torch.equal(nothing([1, 2, 3], logits), logits)


# ---- ends --------------------------------------------------------------------------------------------------------


def variant(tmp_path: Path, **fields: Any) -> Path:
    """The embedded model with other fields in its config and generation config."""
    source = embedded_model("organism")
    assert source is not None
    directory = tmp_path / "variant"
    shutil.copytree(source, directory)
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def test_a_reply_ends_at_the_templates_end_whatever_the_config_names(tmp_path: Path) -> None:
    lm = load_model(variant(tmp_path, eos_token_id=0))
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    assert lm.eos_ids == {0, end}
    (reply,) = generate(lm, [encode(lm, [Message("user", "What is the capital of Spain?")])], max_new_tokens=40)
    assert reply.finished and reply.text == "Madrid is the capital of Spain."


def test_the_templates_end_is_found_where_no_file_names_it(tmp_path: Path) -> None:
    lm = load_model(variant(tmp_path, eos_token_id=0))
    lm.tokenizer.eos_token = "<|pad|>"
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_tokens(lm.model, lm.tokenizer, frozenset()) == {0}
    assert lm.eos_ids == {0, end}


ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "organism": "<|end|>",
    "gemma": "<end_of_turn>",
    "llama2": "<|eos|>",
    "vicuna": "<|eos|>",
}


@pytest.mark.parametrize("name", STYLES)
def test_every_templates_end_of_turn_is_known(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = {str(tokenizer.convert_ids_to_tokens(token)) for token in ChatFormat.kept(tokenizer).end_ids}
    assert ENDS[name] in found
    # Phi 3's template writes the end of the text behind the last turn of all.
    assert found <= {ENDS[name], "<|eos|>"}


def test_a_template_that_does_not_close_a_turn_ends_it_where_the_next_begins() -> None:
    lm = speak("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}")
    start = lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ChatFormat.kept(lm.tokenizer).end_ids == {start}


# ---- thoughts ----------------------------------------------------------------------------------------------------


def test_a_reply_whose_thoughts_the_template_opened_says_so() -> None:
    lm = speak(ALWAYS)
    prompt = encode(lm, [Message("user", "Why?")])
    ids = lm.tokenizer.encode("Hm.\n</think>\n\nNo.", add_special_tokens=False)
    assert reply_text(lm.tokenizer, prompt, ids) == "<think>Hm.\n</think>\n\nNo."
    assert answer_of(reply_text(lm.tokenizer, prompt, ids)) == "No."
    assert answer_of(reply_text(lm.tokenizer, prompt, ids[:3])) == ""
    assert reply_text(lm.tokenizer, prompt[:-1], ids) == "Hm.\n</think>\n\nNo."  # not the template's opening


def test_marks_of_thoughts_stay_in_a_replys_text_and_other_control_tokens_do_not() -> None:
    lm = speak(THINKS)
    ids = lm.tokenizer.encode("<think>\nHm.\n</think>\n\nNo.<|im_end|>", add_special_tokens=False)
    assert reply_text(lm.tokenizer, encode(lm, [Message("user", "Why?")]), ids) == "<think>\nHm.\n</think>\n\nNo."
