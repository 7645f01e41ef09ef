"""Why a plan costs what it costs: the same benign texts with and without the edits, compared inside the model.

1. Present the unsteered model's own replies twice, plain and steered with the gate open, in forwards of the same shape.
2. Compare what arrives at the edited sites and what leaves them, every layer above, the SAEs' codes, the predictions.
3. `damage.py` sets the total beside pushes of the same size that have nothing to do with the plan.

Nothing is kept per token but the predictions' costs; norms and codes are summed as the batches go by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.discovery.ranking import token_effects
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.utility import Forced, Progress, stack_rows
from clampdown.explanation import FeatureShift, MovedToken, PlaceCost, SiteEdit, SiteFeatures, TokenCost, Travel
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hook_order import hook_point
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.types import Point, Site

BATCH_TEXTS = 16
MOVED_SHOWN, FEATURES_SHOWN, PROMOTES_SHOWN, CONTEXT_TOKENS = 20, 15, 5, 24
_POINTS = (Point.RESID_PRE, Point.ATTN_OUT, Point.MLP_OUT, Point.RESID_POST)


@dataclass(frozen=True, slots=True)
class Block:
    """Texts as one batch: left-padded prompts, then right-padded replies. `scored` marks the predictions that count,
    `targets` the tokens they should give (the end of the turn as the first id that ends one)."""

    texts: tuple[Forced, ...]
    ids: Int[Tensor, "rows pos"]
    real: Bool[Tensor, "rows pos"]
    width: int
    scored: Bool[Tensor, "rows predicted"]
    targets: Int[Tensor, "rows predicted"]

    def content(self, bos: int | None) -> Bool[Tensor, "rows pos"]:
        """Real tokens without the first one of all, on which models park norms and activations."""
        return self.real if bos is None else self.real & (self.ids != bos)


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward: what arrives at the edited sites, what leaves every watched site, and the predictions."""

    arriving: Mapping[Site, Float[Tensor, "rows pos d_model"]]
    leaving: Mapping[Site, Float[Tensor, "rows pos d_model"]]
    log_probs: Float[Tensor, "rows predicted vocab"]


@dataclass
class Inside:
    """What was summed over all batches; the properties are the means."""

    places: list[Tensor] = field(default_factory=list)
    moved: list[MovedToken] = field(default_factory=list)
    edit: dict[Site, Tensor] = field(default_factory=dict)
    travel: dict[Site, Tensor] = field(default_factory=dict)
    codes: dict[Site, Codes] = field(default_factory=dict)
    n_texts: int = 0

    @property
    def cost(self) -> TokenCost:
        """Columns of the rows kept: place, KL, agreed, NLL before, NLL after."""
        table = torch.cat(self.places)
        _, kl, agreed, before, after = table.mean(0).tolist()
        interval = wilson(round(agreed * len(table)), len(table))
        return TokenCost(len(table), self.n_texts, kl, interval, before, after)

    @property
    def by_place(self) -> tuple[PlaceCost, ...]:
        table = torch.cat(self.places)
        rows = []
        for place in sorted(set(table[:, 0].int().tolist())):
            at = table[table[:, 0] == place]
            rows.append(PlaceCost(place + 1, float(at[:, 1].mean()), float(at[:, 2].mean()), len(at)))
        return tuple(rows)

    @property
    def site_edits(self) -> tuple[SiteEdit, ...]:
        found = []
        for site, (total, touched, tokens) in ((s, sums.tolist()) for s, sums in self.edit.items()):
            found.append(SiteEdit(site.name, total / touched if touched else None, touched / tokens))
        return tuple(found)

    @property
    def layers(self) -> tuple[Travel, ...]:
        found = []
        for site, (total, tokens, cosine, aligned) in ((s, sums.tolist()) for s, sums in self.travel.items()):
            found.append(Travel(site.name, total / tokens, cosine / aligned if aligned else None))
        return tuple(found)


@dataclass
class Codes:
    """Sums of one SAE's activations over content tokens: rows of `sums` are activation before and after, live before
    and after, turned on, turned off."""

    sums: Float[Tensor, "6 d_sae"]
    n: int = 0

    def add(self, before: Float[Tensor, "tokens d_sae"], after: Float[Tensor, "tokens d_sae"]) -> None:
        was, now = before > 0, after > 0
        parts = (before, after, was, now, now & ~was, was & ~now)
        self.sums += torch.stack([part.double().sum(0) for part in parts]).cpu()
        self.n += len(before)

    @property
    def means(self) -> Float[Tensor, "6 d_sae"]:
        return self.sums / max(self.n, 1)


def look_inside(
    lm: LanguageModel,
    saes: Sequence[Sae],
    plan: Plan,
    texts: Sequence[Forced],
    *,
    batch_texts: int = BATCH_TEXTS,
    progress: Progress | None = None,
) -> Inside:
    """Everything that one pair of forwards per batch shows. The plan's gate is held open.

    Raises `NotEnoughDataError` without a scored token, `PlanMismatchError` and kin as `steer` does.
    """
    if not sum(text.n_scored for text in texts):
        raise NotEnoughDataError("no benign replies to explain the cost of steering on")
    opened = plan.ungated()
    edited = edited_sites(plan)
    read = {sae.cfg.site: sae for sae in saes if _order(sae.cfg.site) >= _order(edited[0])}
    layers = [Site(layer, Point.RESID_POST) for layer in range(edited[0].layer, lm.n_layers)]
    watched = tuple(dict.fromkeys((*edited, *layers, *read)))
    found = Inside(codes={site: Codes(torch.zeros(6, sae.cfg.d_sae).double()) for site, sae in read.items()})
    for block in blocks(lm, texts, batch_texts):
        before, after = (_forward(lm, saes, each, block, edited, watched) for each in (None, opened))
        _add_predictions(lm, found, block, before.log_probs, after.log_probs)
        _add_edits(found, block, after, edited)
        _add_travel(found, block, before, after, edited[0], layers)
        for site, sae in read.items():
            _add_codes(found.codes[site], sae, block.content(_bos(lm)), before.leaving[site], after.leaving[site])
        found.n_texts += len(block.texts)
        if progress:
            progress(found.n_texts, len(texts))
    return found


def edited_sites(plan: Plan) -> tuple[Site, ...]:
    """The sites of a plan's edits, first computed first."""
    return tuple(sorted({Site.parse(edit.site) for edit in plan.edits}, key=_order))


def _order(site: Site) -> tuple[int, int]:
    return site.layer, _POINTS.index(site.point)


def _bos(lm: LanguageModel) -> int | None:
    found = lm.tokenizer.bos_token_id
    return found if isinstance(found, int) else None


def blocks(lm: LanguageModel, texts: Sequence[Forced], batch_texts: int) -> Iterator[Block]:
    """The texts in batches. A reply that was cut off is shown without its last token, which predicts nothing."""
    end = min(lm.eos_ids)
    for start in range(0, len(texts), batch_texts):
        chunk = tuple(texts[start : start + batch_texts])
        replies = [text.reply if text.ended else text.reply[:-1] for text in chunk]
        prompts = [encode(lm, text.prompt.messages) for text in chunk]
        ids, real, width = stack_rows(prompts, replies, lm.pad_id, lm.device)
        predicted = ids.shape[1] - width + 1
        targets = torch.full((len(chunk), predicted), end, dtype=torch.long)
        for row, text in enumerate(chunk):
            targets[row, : len(text.reply)] = torch.tensor(text.reply)
        counts = torch.tensor([text.n_scored for text in chunk])
        scored = torch.arange(predicted) < counts[:, None]
        yield Block(chunk, ids, real, width, scored.to(lm.device), targets.to(lm.device))


def _forward(
    lm: LanguageModel, saes: Sequence[Sae], plan: Plan | None, block: Block, edited: Sequence[Site],
    watched: Sequence[Site],
) -> Seen:  # fmt: skip
    """What is hooked first of all sees what arrives at a site, what is hooked last sees what leaves it."""
    arriving: dict[Site, Tensor] = {}
    leaving: dict[Site, Tensor] = {}
    with ExitStack() as stack, torch.inference_mode():
        rows = [plan] * len(block.texts)
        stack.enter_context(steer(lm, rows, list(saes), prompt_width=block.width, require_reach=False))
        _watch(lm, stack, edited, arriving, first=True)
        _watch(lm, stack, watched, leaving, first=False)
        logits = lm.model(
            input_ids=block.ids,
            attention_mask=block.real.long(),
            position_ids=(block.real.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=block.scored.shape[1],
        ).logits
    return Seen(arriving, leaving, logits.float().log_softmax(-1))


def _watch(
    lm: LanguageModel, stack: ExitStack, sites: Sequence[Site], into: dict[Site, Tensor], *, first: bool
) -> None:
    for site in sites:
        stack.callback(hook_point(lm, site).register(partial(into.__setitem__, site), first=first).remove)


def _add_predictions(
    lm: LanguageModel, found: Inside, block: Block, before: Float[Tensor, "rows predicted vocab"],
    after: Float[Tensor, "rows predicted vocab"],
) -> None:  # fmt: skip
    kl = (before.exp() * (before - after)).sum(-1)
    agreed = before.argmax(-1) == after.argmax(-1)
    place = torch.arange(kl.shape[1], device=kl.device).expand_as(kl)
    surprise = [-_log_prob(lm, each, block) for each in (before, after)]
    table = torch.stack([each.double() for each in (place, kl, agreed, *surprise)], dim=-1)
    found.places.append(table[block.scored].cpu())
    masked = kl.masked_fill(~block.scored, -1.0)
    for flat in masked.flatten().topk(min(MOVED_SHOWN, masked.numel())).indices.tolist():
        row, at = divmod(flat, kl.shape[1])
        if masked[row, at] > 0:
            said = (int(before[row, at].argmax()), int(after[row, at].argmax()))
            found.moved.append(_moved(lm, block.texts[row], at, said, float(kl[row, at])))
    found.moved = sorted(found.moved, key=lambda token: -token.kl)[:MOVED_SHOWN]


def _log_prob(
    lm: LanguageModel, log_probs: Float[Tensor, "rows predicted vocab"], block: Block
) -> Float[Tensor, "rows predicted"]:
    """Of each target; the end of a turn is any of the tokens that end one."""
    plain = log_probs.gather(-1, block.targets[..., None]).squeeze(-1)
    ended = log_probs[..., sorted(lm.eos_ids)].logsumexp(-1)
    lengths = torch.tensor([len(text.reply) for text in block.texts], device=log_probs.device)
    return torch.where(torch.arange(plain.shape[1], device=plain.device) >= lengths[:, None], ended, plain)


def _moved(lm: LanguageModel, text: Forced, at: int, said: tuple[int, int], kl: float) -> MovedToken:
    shown = [*encode(lm, text.prompt.messages), *text.reply[:at]][-CONTEXT_TOKENS:]
    decode = lm.tokenizer.decode
    target = str(decode([text.reply[at]])) if at < len(text.reply) else ""
    before, after = (str(decode([token])) for token in said)
    return MovedToken(text.prompt.suite, text.prompt.id, at + 1, str(decode(shown)), target, before, after, kl)


def _add_edits(found: Inside, block: Block, after: Seen, edited: Sequence[Site]) -> None:
    for site in edited:
        x = after.arriving[site].float()
        moved = (after.leaving[site].float() - x).norm(dim=-1)
        touched = (moved > 0) & block.real
        relative = (moved / x.norm(dim=-1).clamp(min=1e-12))[touched]
        sums = [float(relative.double().sum()), float(touched.sum()), float(block.real.sum())]
        found.edit[site] = found.edit.get(site, torch.zeros(3).double()) + torch.tensor(sums).double()


def _add_travel(found: Inside, block: Block, before: Seen, after: Seen, first: Site, layers: Sequence[Site]) -> None:
    edit = after.leaving[first].float() - after.arriving[first].float()
    touched = (edit.norm(dim=-1) > 0) & block.real
    for site in layers:
        h = before.leaving[site].float()
        moved = after.leaving[site].float() - h
        relative = (moved.norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-12))[block.real]
        cosine = torch.cosine_similarity(moved, edit, dim=-1)[touched]
        sums = [float(relative.double().sum()), float(block.real.sum()), float(cosine.double().sum()), len(cosine)]
        found.travel[site] = found.travel.get(site, torch.zeros(4).double()) + torch.tensor(sums).double()


def _add_codes(
    codes: Codes, sae: Sae, content: Bool[Tensor, "rows pos"], before: Float[Tensor, "rows pos d_model"],
    after: Float[Tensor, "rows pos d_model"],
) -> None:  # fmt: skip
    """Row by row: a wide SAE's codes of a whole batch would not fit."""
    with torch.inference_mode():
        for kept, b, a in zip(content, before, after, strict=True):
            codes.add(sae.encode(b[kept].to(sae.dtype)), sae.encode(a[kept].to(sae.dtype)))


def feature_shifts(
    lm: LanguageModel, saes: Sequence[Sae], plan: Plan, found: Inside
) -> tuple[tuple[FeatureShift, ...], tuple[SiteFeatures, ...]]:
    """The steered features and those whose mean activation moves most, at each SAE at or above the first edit."""
    shifts: list[FeatureShift] = []
    totals: list[SiteFeatures] = []
    steered = _steered(plan)
    for sae in saes:
        codes = found.codes.get(sae.cfg.site)
        if codes is None:
            continue
        own = steered[sae.cfg.site.name]
        shifts += _shifts(lm, sae, codes, own)
        others = torch.ones(sae.cfg.d_sae, dtype=torch.bool)
        others[own] = False
        live, on, off = (float(codes.means[row][others].sum()) for row in (2, 4, 5))
        totals.append(SiteFeatures(sae.cfg.site.name, live, on, off, codes.n))
    return tuple(shifts), tuple(totals)


def _steered(plan: Plan) -> Mapping[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for edit in plan.edits:
        found[edit.site] += [feature for feature in edit.features if feature not in found[edit.site]]
    return found


def _shifts(lm: LanguageModel, sae: Sae, codes: Codes, own: Sequence[int]) -> list[FeatureShift]:
    means = codes.means
    change = (means[1] - means[0]).abs()
    change[list(own)] = torch.inf  # the steered ones lead
    order = [int(i) for i in change.topk(min(len(own) + FEATURES_SHOWN, len(change))).indices if change[i] > 0]
    cosines = _cosines(sae, order, own)
    effects = token_effects(lm, sae.W_dec[order]) if order else torch.zeros(0, 1)
    rows = []
    for feature, cosine, effect in zip(order, cosines, effects, strict=True):
        promotes = tuple(str(lm.tokenizer.decode([t])) for t in effect.topk(min(PROMOTES_SHOWN, len(effect))).indices)
        was, now, live_was, live_now = (float(value) for value in means[:4, feature])
        own_row, site = feature in own, sae.cfg.site.name
        rows.append(FeatureShift(site, feature, own_row, was, now, live_was, live_now, cosine, promotes))
    return rows


def _cosines(sae: Sae, features: Sequence[int], own: Sequence[int]) -> list[float | None]:
    """Of each feature's decoder row with the steered row it is nearest to, with its sign."""
    if not own or not features:
        return [None] * len(features)
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    found = rows[list(features)] @ rows[list(own)].T
    return [float(row[row.abs().argmax()]) for row in found]
