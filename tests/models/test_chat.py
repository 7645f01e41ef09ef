"""Content against template, for templates as they are found in the wild; tokenizers are trained here."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clampdown.errors import ChatTemplateError, ScopeError
from clampdown.models.chat import ChatFormat, encode, pad_left
from clampdown.types import Message

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ORGANISM = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A template with the special tokens that its tokenizer has, and whether it can say system turns."""

    template: str
    special: tuple[str, ...]
    system: bool = True


STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Style(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "phi3": Style(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "organism": Style(ORGANISM, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "gemma": Style(GEMMA, ("<start_of_turn>", "<end_of_turn>"), system=False),
    "llama2": Style(LLAMA2, (), system=False),
    "vicuna": Style(VICUNA, ()),
}
# The pattern of Llama 3 and Qwen: punctuation takes the newlines after it, and newlines stick together.
MODERN = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = [
    "You are a helpful assistant.\n\nsystem\nuser\nassistant\nUSER: what is it?\nASSISTANT: it is this.\n",
    "[INST] no [/INST]",
    "How do I kill a process?\n\n\nUse kill (1).\n  Then wait;\n\nok!\n",
] * 20


def tokenizer_for(style: Style) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges across punctuation and newlines, as real ones have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(MODERN, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", *style.special]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=style.template,
    )


TOKENIZERS = {name: tokenizer_for(style) for name, style in STYLES.items()}
FORMATS = {name: ChatFormat.of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def speaker(name: str) -> Any:
    """All that `encode` asks of a language model."""
    return SimpleNamespace(tokenizer=TOKENIZERS[name])


def content_by_offsets(name: str, messages: list[Message]) -> list[bool]:
    """Ground truth for one conversation: does a token overlap a message, as the rendered text shows it?"""
    tokenizer = TOKENIZERS[name]
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inside, cursor = set(), 0
    for message in messages:
        shown = message.content.strip() if "trim" in STYLES[name].template else message.content
        begin = text.index(shown, cursor)
        cursor = begin + len(shown)
        inside |= set(range(begin, cursor))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [any(i in inside for i in range(*span)) for span in encoded["offset_mapping"]]


def mask_of(name: str, messages: list[Message], pads: int = 0) -> list[bool]:
    ids = encode(speaker(name), messages)
    batch = pad_left([ids, [7] * (len(ids) + pads)], pad_id=0)
    return FORMATS[name].content_mask(batch.input_ids, batch.attention_mask)[0, pads:].tolist()


def conversation(style: Style, *contents: str) -> list[Message]:
    roles = ["system"] * style.system + ["user", "assistant"] * 3
    used = contents if style.system else contents[1:]
    return [Message(role, content) for role, content in zip(roles, used, strict=False)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize(
    "contents",
    [
        ("Be brief.", "How do I kill a process?"),
        ("Be brief.\n\nAlways.", "  (two)\nlines\n\n- a list;\n- of items.", "Use kill!", "and then?\n"),
        ("x", "\n\nwhat\n", "nothing.", "user assistant system", "ok", "7 USER ASSISTANT INST?"),
    ],
    ids=["single", "multi-turn", "hostile"],
)
def test_content_is_what_people_wrote(name: str, contents: tuple[str, ...]) -> None:
    messages = conversation(STYLES[name], *contents)
    assert mask_of(name, messages, pads=3) == content_by_offsets(name, messages)


@pytest.mark.parametrize("name", STYLES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_content_is_what_people_wrote_whatever_they_write(name: str, data: st.DataObject) -> None:
    words = st.lists(
        st.sampled_from(["zebra", " kill", "7", "\n", "\n\n", ".", "?", ")", " (", ";\n", "user", "  ", "x"]),
        min_size=1,
        max_size=8,
    )
    n = data.draw(st.sampled_from([1, 3, 5]))
    contents = ["a" + "".join(data.draw(words)) + "b" + data.draw(st.sampled_from(["", ".", "?", ")", "\n"]))]
    contents += ["".join(data.draw(words)) + "z" for _ in range(n)]
    messages = conversation(STYLES[name], *contents)
    assert mask_of(name, messages) == content_by_offsets(name, messages)


@pytest.mark.parametrize("name", STYLES)
def test_prompts_end_with_the_generation_prompt(name: str) -> None:
    lm = speaker(name)
    prompts = [encode(lm, [Message("user", text)]) for text in ("Hello there", "Why?", "How do I kill a process")]
    batch = pad_left(prompts, pad_id=0)
    start = FORMATS[name].assistant_start(batch.input_ids)
    assert start == batch.input_ids.shape[1] - len(FORMATS[name].generation_prompt)
    after = TOKENIZERS[name].decode(batch.input_ids[0, start:])
    assert after in lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello there"}], tokenize=False, add_generation_prompt=True
    )
    assert len(FORMATS[name].generation_prompt) > 0


def test_a_prompt_without_generation_prompt_has_no_assistant_start() -> None:
    ids = encode(speaker("chatml"), [Message("user", "Hello")], add_generation_prompt=False)
    with pytest.raises(ScopeError, match="assistant header"):
        FORMATS["chatml"].assistant_start(torch.tensor([ids]))


def test_a_default_system_prompt_is_template() -> None:
    ids = encode(speaker("chatml"), [Message("user", "Hello")])
    mask = FORMATS["chatml"].content_mask(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    assert TOKENIZERS["chatml"].decode(torch.tensor(ids)[mask[0]]) == "Hello"


def test_control_tokens_that_somebody_typed_are_content() -> None:
    ids = encode(speaker("chatml"), [Message("user", "say <|im_end|> twice")])
    mask = FORMATS["chatml"].content_mask(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    assert TOKENIZERS["chatml"].decode(torch.tensor(ids)[mask[0]]) == "say <|im_end|> twice"


def test_the_reply_is_content() -> None:
    name = "llama3"
    ids = encode(speaker(name), [Message("user", "Hi")]) + TOKENIZERS[name].encode("ok then")
    mask = FORMATS[name].content_mask(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    assert TOKENIZERS[name].decode(torch.tensor(ids)[mask[0]]) == "Hiok then"


def test_encoding_equals_the_librarys() -> None:
    for name in STYLES:
        tokenizer = TOKENIZERS[name]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello there"}], add_generation_prompt=True, return_dict=False
        )
        assert encode(speaker(name), [Message("user", "Hello there")]) == expected


def test_no_template_is_an_error_that_says_so() -> None:
    tokenizer = tokenizer_for(STYLES["chatml"])
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatFormat.of(tokenizer)


def test_a_turn_that_the_template_cannot_say_is_an_error() -> None:
    with pytest.raises(ChatTemplateError, match="System role not supported"):
        encode(speaker("gemma"), [Message("system", "x"), Message("user", "y")])


def test_pad_left_keeps_order_and_counts_positions() -> None:
    batch = pad_left([[5, 6, 7], [8], []], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
