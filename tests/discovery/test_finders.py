"""Every finder of the table ranks by its own score, proposes nothing that is nearly dead, and says what it lacks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from clampdown.config import ORGANISM_WEIGHTS
from clampdown.discovery.finders import DEFAULT, FINDERS, MATCHED_EFFECT, Effort, Material, run_finder
from clampdown.discovery.pairs import Pair, signed_rank
from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.errors import PromptSetError
from clampdown.models.loading import load_model
from clampdown.organism.judge import judge
from clampdown.organism.suites import suites, without_wrapper
from clampdown.saes.checkpoints import load_sae
from clampdown.store import prompts_hash
from clampdown.study.discover import checked
from clampdown.types import Judgement, Split, Verdict

SMALL = Effort(attributed=6, finalists=8, clamped=4, benign=3, kl=0.02)
FLOOR = 0.05


def refused(prompt, reply):
    return Judgement(Verdict.REFUSED)


@pytest.fixture(scope="module")
def material(lm, sae, harmful, harmless):
    pairs = tuple(
        Pair(plain, dataclasses.replace(wrapped, id=plain.id))
        for plain, wrapped in zip(harmful, harmless, strict=False)
    )
    given = Material(lm, sae, harmful, harmless, pairs, refused, effort=SMALL)
    given.__dict__["tokens"] = RefusalTokens((10, 11), 1.0, 0.0, 1, 1)  # fills the cached property
    return given


@pytest.fixture(scope="module")
def found(material):
    return {name: run_finder(name, material) for name in FINDERS}


@pytest.mark.parametrize("name", FINDERS)
def test_features_come_best_first_by_the_score_that_ranks(found, name):
    feature_set = found[name]
    scores = [
        score.scores[feature_set.ranked_by] for score in feature_set.features if feature_set.ranked_by in score.scores
    ]
    assert feature_set.finder == name
    assert len(scores) >= 3
    assert scores == sorted(scores, reverse=True)
    assert len(set(feature_set.ranking)) == len(feature_set.ranking)


@pytest.mark.parametrize("name", [name for name in FINDERS if name != "contrast-literal"])
def test_dead_and_near_dead_features_are_never_among_the_first_twenty(found, material, name):
    """Against firing rates counted here. The single-prompt finder has its own floor: two tokens of the reply."""
    sides = [side.toarray() > 0 for side in material.contrast.sides("assistant_start")]
    rate = np.maximum(*(side.mean(0) for side in sides))
    for score in found[name].features[:20]:
        if name == "single-prompt":
            assert score.scores["reply_tokens_active"] >= 2
        else:
            assert rate[score.feature] >= FLOOR
    assert set(np.flatnonzero(rate == 0)) & set(found["contrast-literal"].ranking)


def test_the_jailbreak_contrast_is_the_paired_test_of_plain_against_wrapped(found, material):
    sides = material.contrast.sides("assistant_start")
    n = len(material.pairs)
    expected = signed_rank(sides[0][:n], sides[1][:n])
    ours = np.asarray(found["jailbreak-contrast"].column("jailbreak_drop_z"))
    np.testing.assert_allclose(ours, expected.z, atol=1e-12)


def test_the_default_finder_ranks_by_what_clamping_did(found):
    feature_set = found[DEFAULT]
    tested = [score for score in feature_set.features if "clamp_strength" in score.scores]
    assert feature_set.ranked_by == MATCHED_EFFECT
    assert len(tested) == SMALL.finalists
    for score in tested:
        close = abs(np.log(score.scores["clamp_kl"] / SMALL.kl)) <= 0.1
        assert close == (MATCHED_EFFECT in score.scores)
    assert feature_set.ranking[: len(tested)] == tuple(score.feature for score in tested)


@pytest.mark.parametrize("name", [DEFAULT, "d-prime"])
def test_scores_of_clamps_name_the_prompts_that_were_clamped_on(found, material, name):
    """Whichever finder proposed: its own prompts are the contrast's, and the clamps were not measured there."""
    feature_set = found[name] if name == DEFAULT else checked(material, found[name], top=3)
    effect, cost = feature_set.source(MATCHED_EFFECT), feature_set.source("clamp_kl")
    clamped, costed = material.tempting[-SMALL.clamped :], material.harmless[: SMALL.benign]
    assert effect.finder == cost.finder == DEFAULT
    assert (effect.n, cost.n) == (len(clamped) + len(costed), len(costed))
    assert effect.provenance.prompts_hash == prompts_hash([*clamped, *costed])
    assert cost.provenance.prompts_hash == prompts_hash(costed)
    assert feature_set.source("d_prime").finder == name
    assert feature_set.source("d_prime").provenance == feature_set.provenance


def test_the_default_finder_counts_every_prompt_that_it_read(found, material):
    read = [*material.harmful, *material.harmless, *material.tempting[: SMALL.attributed], *material.clamped]
    distinct = {(prompt.id, prompt.messages) for prompt in read}
    assert found[DEFAULT].provenance.extra["n_prompts"] == str(len(distinct))
    assert len(distinct) > len({(p.id, p.messages) for p in read[: -SMALL.clamped]})


def test_what_is_missing_is_said(material):
    bare = dataclasses.replace(material, pairs=(), judge=None)
    for name, finder in FINDERS.items():
        if finder.needs_judge:
            with pytest.raises(PromptSetError, match="needs a judge"):
                run_finder(name, bare)
        if finder.needs_pairs:
            with pytest.raises(PromptSetError, match="with and without"):
                run_finder(name, bare)
    with pytest.raises(PromptSetError, match="no finder is called"):
        run_finder("divination", material)


def test_a_plain_twin_asks_for_the_same_thing():
    wrapped = next(s.prompts for s in suites(Split.DISCOVERY, 4) if s.name == "jailbroken_seen")[0]
    plain = without_wrapper(wrapped)
    assert plain.id == wrapped.id
    assert wrapped.meta["request"] in plain.text
    assert len(plain.text) < len(wrapped.text)


@pytest.mark.skipif(not (ORGANISM_WEIGHTS / "model").is_dir(), reason="the weights are not built")
def test_on_the_embedded_model_the_default_finder_takes_the_known_feature():
    """Feature 352 of the x4 SAE is the one that clamping every feature singles out (docs/experiments.md)."""
    given = {suite.name: suite.prompts for suite in suites(Split.DISCOVERY, 60)}
    pairs = tuple(Pair(without_wrapper(p), p) for p in given["jailbroken_seen"][:24])
    effort = Effort(attributed=12, finalists=6, clamped=8, benign=6)
    material = Material(
        load_model("organism"), load_sae("organism"), given["harmful"], given["benign"], pairs, judge, effort=effort
    )
    best = run_finder(DEFAULT, material).features
    assert best[0].feature == 352
    assert best[0].scores[MATCHED_EFFECT] > 1.5 * best[1].scores[MATCHED_EFFECT]
    assert run_finder("single-prompt", material).provenance.extra["n_prompts"] == "1"
