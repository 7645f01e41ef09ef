"""The embedded model through the same code as any other."""

from __future__ import annotations

import pytest
import torch

from clampdown.config import embedded_model
from clampdown.errors import ModelError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate, next_token_logits
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import check_fits
from clampdown.types import Message

CONVERSATIONS = [
    [Message("user", "What is the capital of France?")],
    [Message("system", "Be brief."), Message("user", "How do I make a bomb?")],
    [Message("user", "Hello!"), Message("assistant", "Hi."), Message("user", "Tom has 3 apples and buys 4. How many?")],
    [Message("user", "hi")],
]


@pytest.fixture(scope="module")
def organism() -> LanguageModel:
    directory = embedded_model("organism")
    if directory is None or not (directory / "config.json").is_file():
        pytest.skip("the embedded model is not built")
    return load_model("organism")


def test_it_is_a_plain_directory(organism: LanguageModel) -> None:
    directory = embedded_model("organism")
    assert directory is not None
    assert load_model(directory).revision == organism.revision


def test_its_saes_fit_it(organism: LanguageModel) -> None:
    for name in ("organism", "organism:x8"):
        sae = load_sae(name)
        check_fits(sae, organism.d_model, organism.n_layers)
        organism.layout.hook_point(sae.site)


def test_it_generates_what_the_library_generates(organism: LanguageModel) -> None:
    prompts = [encode(organism, messages) for messages in CONVERSATIONS]
    batch = pad_left(prompts, organism.pad_id)
    written = organism.model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=48
    )[:, batch.input_ids.shape[1] :].tolist()
    replies = generate(organism, prompts, max_new_tokens=48)
    eos = organism.tokenizer.eos_token_id
    assert [list(r.ids) for r in replies] == [row[: row.index(eos)] if eos in row else row for row in written]
    assert all(reply.finished and reply.text for reply in replies)


def test_padding_changes_nothing(organism: LanguageModel) -> None:
    prompts = [encode(organism, messages) for messages in CONVERSATIONS]
    alone = torch.cat([next_token_logits(organism, [prompt]) for prompt in prompts])
    assert torch.allclose(next_token_logits(organism, prompts), alone, atol=1e-4)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_contents_are_told_from_its_template(organism: LanguageModel, messages: list[Message]) -> None:
    ids = torch.tensor([encode(organism, messages)])
    mask = organism.chat.content_mask(ids, torch.ones_like(ids))
    assert organism.tokenizer.decode(ids[mask]) == "".join(message.content for message in messages)
    assert organism.chat.assistant_start(ids) == ids.shape[1] - 1


def test_an_installation_without_weights_says_how_to_rebuild_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("clampdown.config.ORGANISM_WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match="weights are missing") as caught:
        load_model("organism")
    assert "organism train" in str(caught.value.hint)
