"""Numbers on a card against the same numbers worked out the long way: full encodes, and the model's own head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from clampdown.cards import Card, read_card, write_card
from clampdown.errors import FeatureIndexError, FeatureSetMismatchError, StoreError
from clampdown.models.chat import encode, render, token_texts
from clampdown.models.loading import load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.study import card as making
from clampdown.study.card import make_card, nearest
from clampdown.types import FeatureScore, FeatureSet, Message, Provenance, ScoreColumns, Split

FEATURE = 352
LM, SAE = load_model("organism"), load_sae("organism")
PROMPTS = [p for suite in suites(Split.DISCOVERY, 6) for p in suite.prompts]


@pytest.fixture(scope="module")
def card() -> Card:
    return make_card(LM, SAE, FEATURE, PROMPTS, [scores()])


def scores() -> FeatureSet:
    values = np.full(512, np.nan)
    values[[1, 2, FEATURE, 4]] = [5.0, 1.0, 3.0, 3.0]
    provenance = Provenance("organism", LM.revision, "organism", "h", "0", 7, {"sae_revision": SAE.revision})
    kept = (FeatureScore(FEATURE, {"d_prime": 3.0, "clamp": 2.0}),)
    return FeatureSet("contrast", SAE.site.name, "d_prime", kept, provenance, {}, ScoreColumns({"d_prime": values}))


@pytest.fixture(scope="module")
def codes() -> list[np.ndarray]:
    """The whole code of every prompt at its content tokens, one prompt at a time."""
    found = []
    for prompt in PROMPTS:
        ids = encode(LM, prompt.messages)
        with torch.no_grad():
            hidden = LM.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[SAE.site.layer + 1][0]
            code = SAE.encode(hidden).numpy()
        names = LM.tokenizer.convert_ids_to_tokens(ids)
        found.append(code[[not name.startswith("<|") for name in names]])
    return found


def test_promoted_and_demoted_tokens_are_the_heads_own(card: Card) -> None:
    model = LM.model
    with torch.no_grad():
        row = SAE.W_dec[FEATURE]
        scaled = row / (row.pow(2).mean() + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
        logits = model.lm_head.weight @ scaled
    best = logits.argsort(descending=True).tolist()
    assert [e.text for e in card.promoted] == [LM.tokenizer.decode([i]) for i in best[:12]]
    assert [e.text for e in card.demoted] == [LM.tokenizer.decode([i]) for i in best[:-13:-1]]
    assert card.promoted[0].effect == pytest.approx(float(logits.max()), rel=1e-4)


def test_peaks_and_order_of_the_examples(card: Card, codes: list[np.ndarray]) -> None:
    peaks = [float(code[:, FEATURE].max()) for code in codes]
    by_id = {(p.suite, p.id): peak for p, peak in zip(PROMPTS, peaks, strict=True)}
    shown = [e.peak for e in card.examples]
    assert shown == sorted(shown, reverse=True)
    assert shown == pytest.approx(sorted(set(peaks), reverse=True)[: len(shown)], abs=1e-3)
    for example in card.examples:
        assert example.peak == pytest.approx(by_id[example.suite, example.prompt_id], abs=1e-3)
        assert example.peak == pytest.approx(max(t.value for t in example.tokens if t.content), abs=1e-5)


def test_template_tokens_are_marked_and_never_rank(card: Card) -> None:
    for example in card.examples:
        prompt = next(p for p in PROMPTS if (p.suite, p.id) == (example.suite, example.prompt_id))
        assert "".join(t.text for t in example.tokens) == render(
            LM.tokenizer, prompt.messages, add_generation_prompt=True
        )
        assert "".join(t.text for t in example.tokens if t.content) == "".join(m.content for m in prompt.messages)
    loud = max(t.value for e in card.examples for t in e.tokens if not t.content)
    assert loud > card.scale, "this feature is loudest on the assistant's header, and still that ranks nothing"


def test_firing_rates_and_their_intervals(card: Card, codes: list[np.ndarray]) -> None:
    for row in card.firing:
        fires = [c[:, FEATURE].max() > 0 for p, c in zip(PROMPTS, codes, strict=True) if p.suite == row.suite]
        wilson = binomtest(sum(fires), len(fires)).proportion_ci(method="wilson")
        assert (row.on_content.value, row.on_content.n) == (sum(fires) / len(fires), len(fires))
        assert (row.on_content.low, row.on_content.high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_the_histogram_counts_every_content_token(card: Card, codes: list[np.ndarray]) -> None:
    values = np.concatenate(codes)[:, FEATURE]
    assert card.histogram.inactive == int((values == 0).sum())
    assert sum(card.histogram.counts) == int((values > 0).sum())
    assert card.histogram.edges[-1] == pytest.approx(values.max(), abs=1e-3)


def test_neighbours_by_cosine_and_coactivation(card: Card, codes: list[np.ndarray]) -> None:
    unit = SAE.W_dec.double() / SAE.W_dec.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit[FEATURE]
    order = [int(i) for i in cosines.argsort(descending=True) if i != FEATURE]
    assert [n.feature for n in card.neighbours] == order[:8]
    stacked = np.concatenate(codes)
    live = stacked[stacked[:, FEATURE] > 0]
    for n in card.neighbours:
        assert n.cosine == pytest.approx(float(cosines[n.feature]), abs=1e-5)
        assert n.together == pytest.approx(float((live[:, n.feature] > 0).mean()), abs=1e-3)


def test_scores_come_with_their_place_and_source(card: Card) -> None:
    by_name = {s.name: s for s in card.scores}
    assert (by_name["d_prime"].value, by_name["d_prime"].place, by_name["d_prime"].among) == (3.0, 2, 4)
    assert by_name["clamp"].among == 1
    assert by_name["d_prime"].source.provenance.seed == 7


def test_a_card_comes_back_as_it_was(card: Card, tmp_path: Path) -> None:
    write_card(tmp_path / "card.json", card)
    assert read_card(tmp_path / "card.json") == card
    (tmp_path / "other.json").write_text('{"schema": 1, "kind": "feature_card", "scores": 3}')
    with pytest.raises(StoreError):
        read_card(tmp_path / "other.json")


def test_a_topk_sae_and_no_prompts_at_all() -> None:
    topk = Sae(replace(SAE.cfg, architecture="topk", k=4, neuronpedia_id="m/3-res"), SAE.tensors, "t", "r")
    card = make_card(LM, topk, 5, PROMPTS[:6])
    plain = make_card(LM, topk, 5, [])
    assert card.neuronpedia == "https://www.neuronpedia.org/m/3-res/5"
    assert plain.examples == plain.firing == () and plain.neighbours[0].together is None
    assert [e.text for e in plain.promoted] == [e.text for e in card.promoted]
    with pytest.raises(FeatureIndexError):
        make_card(LM, topk, 512, [])


def test_long_prompts_are_cut_around_the_peak(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    whole = card.examples[0]
    assert not whole.cut
    monkeypatch.setattr(making, "WINDOW", 6)
    prompt = next(p for p in PROMPTS if (p.suite, p.id) == (whole.suite, whole.prompt_id))
    (example,) = make_card(LM, SAE, FEATURE, [prompt]).examples
    assert example.cut and len(example.tokens) == 6
    assert example.peak == pytest.approx(max(t.value for t in example.tokens if t.content), abs=1e-5)
    assert "".join(t.text for t in example.tokens) in "".join(t.text for t in whole.tokens)


def test_pieces_of_text_join_even_where_characters_take_several_tokens() -> None:
    messages = [Message("user", "naïve 🙂 \n„quoted“")]
    pieces = token_texts(LM, messages)
    assert "".join(pieces) == render(LM.tokenizer, messages, add_generation_prompt=True)
    assert len(pieces) == len(encode(LM, messages))
    assert "" in pieces


def test_neighbours_do_not_depend_on_the_length_of_a_row() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.5, 0.5], [30.0, 40.0]])
    assert nearest(decoder, 0, 2) == pytest.approx({1: 0.5**0.5, 2: 0.6}, abs=1e-6)


def test_weak_activations_are_counted_too() -> None:
    trace = making.Trace(np.array([[0.0], [0.25], [2.0], [9.0]], np.float32), np.array([True, True, True, False]))
    found = making.histogram([making.Read(PROMPTS[0], trace)])
    assert (sum(found.counts), found.inactive, found.edges[-1]) == (2, 1, 2.0)


def test_a_zero_row_is_nobodys_neighbour() -> None:
    decoder = torch.eye(4)
    decoder[2] = 0
    assert nearest(decoder, 0, 9) == {1: 0.0, 2: 0.0, 3: 0.0}


def test_scores_of_another_sae_are_refused(tmp_path: Path) -> None:
    from clampdown.store import write_feature_set
    from clampdown.study.features import ShowRequest, _sets_about

    other = replace(scores(), provenance=replace(scores().provenance, extra={"sae_revision": "x"}))
    write_feature_set(tmp_path / "a.json", other)
    with pytest.raises(FeatureSetMismatchError):
        _sets_about(SAE, ShowRequest(sets=(tmp_path,)))
