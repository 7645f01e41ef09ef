"""What is measured: against coders whose numbers are known, and against the library's own loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clampdown.errors import SaeError
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel, load_model
from clampdown.sae_training import measuring
from clampdown.sae_training.texts import Text, TokenRow
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.types import Message, Site

SITE = Site(3)
ASKED = ("Tell me about the sea.", "How do I bake bread?", "List three birds.")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> list[TokenRow]:
    return [TokenRow(Text("asked"), tuple(encode(lm, [Message("user", text)]))) for text in ASKED]


def perfect(d: int, scale: float = 1.0) -> Sae:
    """Two features per dimension, one for each sign: x' = scale x exactly, and half of the features fire."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    tensors = {"W_enc": both.T.clone(), "W_dec": scale * both, "b_enc": torch.zeros(2 * d), "b_dec": torch.zeros(d)}
    return Sae(SaeConfig("relu", d, 2 * d, SITE, apply_b_dec_to_input=False), tensors)


def noise(n: int = 300, d: int = 16) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_fit_of_coders_whose_numbers_are_known() -> None:
    found = measuring.fit(perfect(16), noise())
    assert found.fvu < 1e-12
    assert found.l0 == 16
    assert (found.dead, found.tokens, found.fired_on) == (0.0, 300, 300)
    x = noise() - noise().mean(0)
    assert measuring.fit(perfect(16, 0.5), x).fvu == pytest.approx(0.25, abs=1e-6)
    silent = replace(perfect(16), tensors={**perfect(16).tensors, "b_enc": torch.tensor([-99.0] + [0.0] * 31)})
    assert measuring.fit(silent, x).dead == 1 / 32
    assert measuring.fit(silent, x, noise(500) + 999).dead == 0.0, "counted on more tokens, it fires"


def test_recovered_is_the_share_of_what_zeroing_loses() -> None:
    assert measuring.Predictions(2.0, 2.5, 4.0, 10).recovered == 0.75
    assert measuring.Predictions(2.0, 2.0, 4.0, 10).recovered == 1.0
    assert measuring.Predictions(2.0, 2.5, 1.0, 10).recovered is None, "nothing is lost without the site"


def test_a_perfect_coder_changes_no_prediction(lm: LanguageModel, rows: list[TokenRow]) -> None:
    found = measuring.predictions(lm, perfect(lm.d_model), rows, 1e9)
    losses, tokens = 0.0, 0
    for row in rows:  # the library's own loss, one text at a time
        ids = torch.tensor([row.ids])
        losses += float(lm.model(ids, labels=ids).loss) * (len(row.ids) - 1)
        tokens += len(row.ids) - 1
    assert found.tokens == tokens
    assert found.ce == pytest.approx(losses / tokens, abs=1e-4)
    assert found.ce_reconstructed == pytest.approx(found.ce, abs=1e-4)
    assert not lm.model.model.layers[3]._forward_hooks, "no hook is left behind"


def test_a_coder_that_says_nothing_is_the_zeroed_model(lm: LanguageModel, rows: list[TokenRow]) -> None:
    found = measuring.predictions(lm, perfect(lm.d_model, 0.0), rows, 1e9)
    assert found.ce_reconstructed == pytest.approx(found.ce_zeroed, abs=1e-4)
    assert found.ce_zeroed != pytest.approx(found.ce, abs=0.1)
    untouched = measuring.predictions(lm, perfect(lm.d_model, 0.0), rows, 0.0)
    assert untouched.ce_reconstructed == pytest.approx(untouched.ce, abs=1e-5), "sinks stay, and here all are sinks"


def test_padding_does_not_show(lm: LanguageModel, rows: list[TokenRow]) -> None:
    sae = load_sae("organism")
    together = measuring.predictions(lm, sae, rows, 1e9)
    alone = [measuring.predictions(lm, sae, [row], 1e9) for row in rows]
    weighted = sum(one.ce_reconstructed * one.tokens for one in alone) / sum(one.tokens for one in alone)
    assert together.ce_reconstructed == pytest.approx(weighted, abs=1e-4)


def test_refusal_log_odds_survive_a_perfect_coder(lm: LanguageModel) -> None:
    asked = [Text("a", (Message("user", text),)) for text in ASKED]
    tokens = measuring.RefusalTokens(ids=(5, 9, 40), coverage=1.0, leakage=0.0, n_refused=1, n_other=1)
    found = measuring.refusals(lm, perfect(lm.d_model), asked, tokens, 1e9)
    assert found.reconstructed == pytest.approx(found.untouched, abs=1e-4)
    assert found.same_side == 1.0 and found.requests == 3
    assert found.correlation == pytest.approx(1.0, abs=1e-4)
    nothing = measuring.refusals(lm, perfect(lm.d_model, 0.0), asked, tokens, 1e9)
    assert nothing.reconstructed != pytest.approx(nothing.untouched, abs=0.01)


def test_longest_is_a_multiple_of_the_median(lm: LanguageModel, rows: list[TokenRow]) -> None:
    batch = pad_left([rows[0].ids], lm.pad_id)
    hidden = lm.model(batch.input_ids, output_hidden_states=True).hidden_states[SITE.layer + 1][0, 1:]
    found = measuring.longest_of(lm, perfect(lm.d_model), rows[:1])
    assert found == pytest.approx(measuring.SINK * float(hidden.norm(dim=1).median()), rel=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_grafting_the_mean_undoes_a_shift(centred: bool) -> None:
    sae = load_sae("organism")
    if not centred:  # the same coder, its input bias written into the encoder
        tensors = {**sae.tensors, "b_enc": sae.tensors["b_enc"] - sae.b_dec @ sae.W_enc}
        sae = replace(sae, cfg=replace(sae.cfg, apply_b_dec_to_input=False), tensors=tensors)
    code = torch.zeros(400, sae.cfg.d_sae)
    draw = torch.Generator().manual_seed(1)
    code.scatter_(1, torch.randint(sae.cfg.d_sae, (400, 6), generator=draw), torch.rand(400, 6, generator=draw) * 20)
    x = sae.decode(code)
    shift = 6 * x.std() * torch.randn(sae.cfg.d_in, generator=draw) / sae.cfg.d_in**0.5
    at_home, away = measuring.fit(sae, x).fvu, measuring.fit(sae, x + shift).fvu
    back = measuring.fit(measuring.grafted(sae, x + shift), x + shift).fvu
    assert away > 1.5 * at_home
    assert back < at_home + 0.2 * (away - at_home)


def test_an_sae_that_normalises_cannot_be_grafted() -> None:
    sae = perfect(16)
    with pytest.raises(SaeError, match="normalises"):
        measuring.grafted(replace(sae, cfg=replace(sae.cfg, normalize_activations="layer_norm")), noise())
