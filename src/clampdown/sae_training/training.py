"""`sae train` and `sae measure`: collect, train, measure, write. Each stage goes on where a killed run stopped.

OUT/activations holds the collected residuals and OUT/training the checkpoint; OUT itself becomes the SAE's directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clampdown.activations.capture import forward_to, length_buckets
from clampdown.config import CODE_VERSION
from clampdown.errors import NotEnoughDataError, StoreError
from clampdown.models.chat import pad_left
from clampdown.models.loading import LanguageModel, load_model
from clampdown.sae_training import files, measuring, shards, trainers
from clampdown.sae_training.rows import choose_rows, is_held_out, is_sink
from clampdown.sae_training.texts import TokenRow, first_requests, mix, read_texts, shuffled, tokenized, without
from clampdown.sae_training.trainers import SaeRecipe
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.study.progress import Stages
from clampdown.types import Site

COUNTED = 1 << 19
"""Most training residuals over which features are counted as dead or rare."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `sae train` is asked for. `tokens` ends the collection early, and texts that hold a request of `kept_out`
    are left out; `texts` and `requests` are for measuring."""

    model: str
    site: Site
    text: tuple[Path, ...]
    out: Path
    recipe: SaeRecipe = field(default_factory=SaeRecipe)
    context: int = 512
    tokens: int | None = None
    dtype: str = "auto"
    model_name: str = ""
    kept_out: tuple[Path, ...] = ()
    texts: int = 32
    requests: int = 32


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What `sae measure` is asked for. `graft` names a directory for a copy that is moved onto this model's mean."""

    model: str
    sae: str
    text: tuple[Path, ...]
    context: int = 512
    tokens: int = 50_000
    texts: int = 32
    requests: int = 32
    seed: int = 0
    graft: Path | None = None


def train(request: Request, stages: Stages) -> dict[str, Any]:
    """Train and write an SAE; returns its card. Raises `StoreError` when `out` holds an SAE already."""
    if (request.out / files.CARD).exists():
        raise StoreError(f"{request.out} holds a trained SAE already", hint="give another --out, or measure it")
    trainers.saelens()
    with stages.stage("Loading"):
        lm = load_model(request.model, dtype=request.dtype)
        lm.layout.hook_point(request.site)
        texts = read_texts(request.text)
        if request.kept_out:
            texts = without(texts, read_texts(request.kept_out))
        rows = tokenized(lm, texts, request.context)
    rows = _within(shuffled(rows, request.recipe.seed), request.tokens)
    with stages.stage("Collecting") as tick:
        shards.collect(shards.Collection(lm, request.site, tuple(rows)), request.out / "activations", tick)
    return train_collected(request, lm, rows, stages)


def train_collected(request: Request, lm: LanguageModel, rows: Sequence[TokenRow], stages: Stages) -> dict[str, Any]:
    """Train on what `out`/activations holds of these texts, measure on those held out, and write."""
    with stages.stage("Reading residuals"):
        chosen = choose_rows(shards.read_collected(request.out / "activations", request.site))
    facts = _facts(request, lm)
    with stages.stage("Training") as tick:
        trained = trainers.train(chosen.train, request.recipe, request.out / "training", facts, tick)
    files.write_trained(trained, request.out, torch.float16)
    sae = load_sae(request.out)
    fit = measuring.fit(sae, chosen.held_out, chosen.train[:COUNTED])
    plain = load_model(request.model) if lm.dtype != torch.float32 else lm
    held_out = [row for row in rows if is_held_out(row.ids)]
    card = {
        "schema": 1,
        "code_version": CODE_VERSION,
        "sae": {**_about(sae, lm), "model": facts["model_name"], "revision": sae.revision},
        "recipe": {**asdict(request.recipe), "context": request.context, "activations": str(lm.dtype)[6:]},
        "residuals": {"train": len(chosen.train), "held_out": len(chosen.held_out), "dropped": chosen.dropped},
        "fit": asdict(fit),
        **_behaviour(plain, sae, held_out, request, stages),
        "text": mix(rows),
    }
    files.write_card(request.out, card)
    return card


def measure(request: MeasureRequest, stages: Stages) -> dict[str, Any]:
    """The same numbers for any SAE on any model that it fits, and a grafted copy when one is asked for."""
    with stages.stage("Loading"):
        lm = load_model(request.model)
        sae = load_sae(request.sae).to(lm.device)
        check_fits(sae, lm.d_model, lm.n_layers)
        rows = tokenized(lm, read_texts(request.text), request.context)
    rows = _within(shuffled(rows, request.seed), request.tokens)
    with stages.stage("Reading residuals") as tick:
        residuals = _residuals(lm, sae, rows, tick)
    before = asdict(measuring.fit(sae, residuals))
    if request.graft is not None:
        sae = measuring.grafted(sae, residuals)
        files.write_moved(sae, request.graft, torch.float32, {"model_name": request.model, "grafted_from": request.sae})
    card = {
        "schema": 1,
        "code_version": CODE_VERSION,
        "sae": _about(sae, lm),
        "fit": asdict(measuring.fit(sae, residuals)),
        **({"fit_before_grafting": before} if request.graft else {}),
        **_behaviour(lm, sae, rows, request, stages),
        "text": mix(rows),
    }
    if request.graft is not None:
        files.write_card(request.graft, card)
    return card


def _within(rows: Sequence[TokenRow], tokens: int | None) -> list[TokenRow]:
    """The first rows that hold about this many tokens; all of them for None."""
    kept, total = [], 0
    for row in rows:
        if tokens is not None and total >= tokens:
            break
        kept.append(row)
        total += len(row.ids)
    return kept


def _facts(request: Request, lm: LanguageModel) -> dict[str, Any]:
    return {
        "model_name": request.model_name or lm.name,
        "model_revision": lm.revision,
        "hook_name": request.site.name,
        "context_size": request.context,
        "prepend_bos": False,
        "dataset_path": "+".join(path.stem for path in request.text),
    }


def _about(sae: Sae, lm: LanguageModel) -> dict[str, Any]:
    return {
        "model": lm.name,
        "model_revision": lm.revision,
        "trained_on": sae.cfg.model_name,
        "site": sae.cfg.site.name,
        "kind": sae.cfg.architecture,
        "features": sae.cfg.d_sae,
        "d_model": sae.cfg.d_in,
    }


def _behaviour(
    lm: LanguageModel, sae: Sae, rows: Sequence[TokenRow], request: Request | MeasureRequest, stages: Stages
) -> dict[str, Any]:
    """What the reconstruction does to predictions and refusals: `refusals` is None where the model refused nothing."""
    seed = request.recipe.seed if isinstance(request, Request) else request.seed
    longest = measuring.longest_of(lm, sae, rows[: request.texts])
    with stages.stage("Predictions") as tick:
        found = measuring.predictions(lm, sae, rows[: request.texts], longest, tick)
    refusals = None
    with stages.stage("Refusals"):
        asked = first_requests([row.text for row in rows], request.requests, seed)
        with suppress(NotEnoughDataError):  # it refused none of them, or all alike
            tokens = measuring.refusal_tokens(lm, asked)
            refusals = asdict(measuring.refusals(lm, sae, asked, tokens, longest))
    return {"predictions": {**asdict(found), "recovered": found.recovered}, "refusals": refusals}


def _residuals(lm: LanguageModel, sae: Sae, rows: Sequence[TokenRow], tick: shards.Progress) -> torch.Tensor:
    """Residuals of the texts at the SAE's site, sinks left out."""
    longest = measuring.longest_of(lm, sae, rows[:32])
    kept, buckets = [], length_buckets([len(row.ids) for row in rows], shards.TOKENS_PER_BATCH)
    for number, bucket in enumerate(buckets):
        batch = pad_left([rows[i].ids for i in bucket], lm.pad_id, lm.device)
        hidden = forward_to(lm, batch, [sae.cfg.site])[sae.cfg.site]
        real = batch.attention_mask.bool() & ~is_sink(hidden.float().norm(dim=-1), batch.position_ids, longest)
        kept.append(hidden[real].float())
        tick(number + 1, len(buckets))
    return torch.cat(kept)
