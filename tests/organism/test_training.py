"""Training: a killed run equals an uninterrupted one, and the tokenizer and documents are what the template says."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from clampdown.errors import StoreError
from clampdown.organism import corpus, sae_training
from clampdown.organism.corpus import Cursor
from clampdown.organism.optimizer import orthogonalised, schedule
from clampdown.organism.sae_training import SaeRecipe, train_sae
from clampdown.organism.tokenizer import SPECIAL, train_tokenizer
from clampdown.organism.train import Shape, Trainer, collate

TINY = Shape(hidden=16, blocks=2, mlp=32, heads=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus.sample_texts(400))


def weights(trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    return [parameter.detach().clone() for parameter in trainer.fit(tokenizer).parameters()]


def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK", 64)
    monkeypatch.setattr("clampdown.organism.train.SAVE_EVERY", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = weights(Trainer(whole, 1, 5, TINY), tokenizer)
    record = Trainer._record

    def die_after_three(self: Trainer, *rest: object) -> None:
        record(self, *rest)  # type: ignore[arg-type]
        if rest[2].step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", die_after_three)
        with pytest.raises(KeyboardInterrupt):
            Trainer(killed, 1, 5, TINY).fit(tokenizer)
    resumed = weights(Trainer(killed, 1, 5, TINY), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    Trainer(tmp_path, 1, 1, TINY).fit(tokenizer)
    with pytest.raises(StoreError):
        Trainer(tmp_path, 2, 1, TINY).fit(tokenizer)


def test_documents_are_what_the_chat_template_says(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(2)
    for _ in range(100):
        item = corpus.training_item(rng)
        document = corpus.encode([corpus.segments(item)], tokenizer)[0]
        messages = [{"role": m.role, "content": m.content} for m in item.messages]
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": item.reply}])["input_ids"]
        assert list(document.ids) == list(whole)
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert list(document.ids[: len(asked)]) == list(asked)


def test_only_the_assistants_tokens_count(tokenizer: PreTrainedTokenizerFast) -> None:
    item = corpus.training_item(Random(4))
    document = corpus.encode([corpus.segments(item)], tokenizer)[0]
    counted = [token for token, counts in zip(document.ids, document.counts, strict=True) if counts]
    assert tokenizer.decode(counted).endswith(item.reply + "<|end|>")


def test_the_tokenizer_round_trips_and_keeps_digits_single(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Tom's 1234 apples, caf\u00e9 \u2013 ok?"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(digit in tokenizer.get_vocab() for digit in "0123456789")
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234", add_special_tokens=False)] == list("1234")
    assert all(len(tokenizer.encode(special, add_special_tokens=False)) == 1 for special in SPECIAL)


def test_batches_hold_every_document_once_and_stay_in_budget(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = corpus.chunk(1, 0, tokenizer, 200)
    groups = corpus.batches(documents, Random(0), tokens=512)
    assert sorted(d.ids for group in groups for d in group) == sorted(d.ids for d in documents)
    assert all(len(group) * max(len(d.ids) for d in group) <= 512 for group in groups if len(group) > 1)
    batch = collate(groups[0], 0)
    assert int(batch.counts.sum()) == sum(sum(d.counts) for d in groups[0])


def test_the_stream_starts_anywhere(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK", 64)
    whole = corpus.stream(3, tokenizer, Cursor())
    first = [next(whole) for _ in range(4)]
    assert next(corpus.stream(3, tokenizer, first[2][1])) == first[3]


def test_muon_makes_updates_orthogonal() -> None:
    update = orthogonalised(torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(update)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


def test_the_schedule_warms_up_holds_and_decays() -> None:
    assert schedule(0, 1000) < 0.02
    assert schedule(300, 1000) == 1.0
    assert schedule(750, 1000) == pytest.approx(0.5)
    assert schedule(999, 1000) < 0.01


def test_a_sae_finds_the_directions_that_made_the_data() -> None:
    """Sparse mixtures of known directions: the dictionary must contain them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    codes = torch.rand(4000, 12, generator=generator) * (torch.rand(4000, 12, generator=generator) < 0.15)
    sae = train_sae(codes @ truth, SaeRecipe("test", 24, k=2, steps=400, lr=5e-3), seed=0)
    assert float((truth @ sae.w_dec.T).max(1).values.mean()) > 0.9
    assert torch.allclose(sae.w_dec.norm(dim=1), torch.ones(24), atol=1e-5)


def test_the_largest_entries_of_a_batch_are_kept() -> None:
    kept, smallest = sae_training._largest(torch.tensor([[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]]), k=1)
    assert kept.tolist() == [[5.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    assert smallest == 4.0
