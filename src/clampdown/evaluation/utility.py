"""What steering does to text that should not change: measured by teacher forcing, without generating anything.

1. The unsteered model answers benign prompts once (`base_replies`). Its replies are then presented to every arm, many
   arms in one batch, the unsteered model among them as the first rows of the same batch.
2. At every position that predicts a token of the reply or its end: KL(base || steered) in nats, and whether both
   would say the same token. Beside it, how large the edit was, from the receipts.
3. Multiple choice by likelihood is the same pass: options take the place of replies, and the likeliest one is the
   answer. It needs no obedience to a format, and it survives where generation is destroyed: report both.

A batch is left-padded prompts followed by right-padded replies, so the prompt ends at one column for all rows and
`steer(..., prompt_width=...)` knows which columns count as generated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.errors import NotEnoughDataError, PromptSetError, ScopeError
from clampdown.evaluation.intervals import mean_interval, wilson
from clampdown.evaluation.scoring import option_mass
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.hooks import steer
from clampdown.steering.options import Continued, continuation_log_likelihoods
from clampdown.steering.plan import Plan
from clampdown.steering.prompt_sharing import distinct
from clampdown.types import Interval, OptionChoice, Prompt, Receipt

Saes = Sae | Sequence[Sae] | None
Progress = Callable[[int, int], None]

BATCH_ROWS = 128
_LARGEST_NLL = 700.0  # exp of more is no float


@dataclass(frozen=True, slots=True)
class Forced:
    """A text to present as the assistant's reply. `ended`: the end of the turn after it is scored as well."""

    prompt: Prompt
    reply: tuple[int, ...]
    ended: bool

    @property
    def n_scored(self) -> int:
        """How many predictions of this reply are scored."""
        return len(self.reply) + self.ended


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm does to benign text. None where nothing could be measured.

    `kl` is KL(base || steered) in nats per predicted token; `top1_agreement` the share of predictions whose likeliest
    token is the same; `nll` the mean negative log-likelihood of the texts in nats; `edit_norm` is mean ||x'-x|| / ||x||
    over touched positions; `touched` their share of all.
    """

    kl: float | None
    top1_agreement: float | None
    edit_norm: float | None
    touched: float | None
    n_tokens: int
    n_prompts: int
    nll: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood of the unsteered model's replies, per predicted token."""
        return None if self.nll is None else math.exp(min(self.nll, _LARGEST_NLL))

    @property
    def mean_edit(self) -> float | None:
        """Mean ||x'-x|| / ||x|| over all positions, touched or not: what controls are matched on."""
        return None if self.edit_norm is None or self.touched is None else self.edit_norm * self.touched


def base_replies(
    lm: LanguageModel, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_rows: int = BATCH_ROWS
) -> tuple[Forced, ...]:
    """The unsteered model's own greedy replies, shortest prompt first."""
    ordered = sorted(((prompt, encode(lm, prompt.messages)) for prompt in prompts), key=lambda row: len(row[1]))
    found: list[Forced] = []
    for start in range(0, len(ordered), batch_rows):
        chunk = ordered[start : start + batch_rows]
        replies = generate(lm, [ids for _, ids in chunk], max_new_tokens=max_new_tokens)
        pairs = zip(chunk, replies, strict=True)
        found.extend(Forced(prompt, reply.ids, reply.finished) for (prompt, _), reply in pairs)
    return tuple(found)


def costs(
    lm: LanguageModel,
    saes: Saes,
    arms: Sequence[Arm],
    forced: Sequence[Forced],
    *,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> dict[str, Cost]:
    """Cost of each arm on the same texts, by arm name.

    Raises `NotEnoughDataError` without texts, `ScopeError` when a plan's scope covers none of their tokens.
    """
    if not sum(text.n_scored for text in forced):
        raise NotEnoughDataError("no benign replies to measure the cost of steering on")
    _refuse_unreached_scope(arms, forced)
    tallies = {arm.name: _Tally() for arm in arms}
    done = 0
    for group, texts in _blocks(arms, forced, batch_rows):
        with torch.inference_mode():
            _tally_block(lm, saes, group, texts, tallies)
        done += len(group) * len(texts)
        if progress:
            progress(done, len(arms) * len(forced))
    return {name: tally.cost(len(forced)) for name, tally in tallies.items()}


def _refuse_unreached_scope(arms: Sequence[Arm], forced: Sequence[Forced]) -> None:
    """Scopes reach any prompt; generated tokens exist only where a reply goes on after its first token."""
    if any(text.n_scored > 1 for text in forced):
        return
    for arm in arms:
        if steers_generated(arm):
            raise ScopeError(f"arm '{arm.name}' steers generated tokens, and these replies have one token each")


def mean_edit(lm: LanguageModel, saes: Saes, forced: Sequence[Forced]) -> Callable[[Plan], float]:
    """A measure for matching controls: a plan's mean ||x'-x|| / ||x|| over all positions of these texts."""
    return lambda plan: _or_nan(_cost_of(lm, saes, forced, plan).mean_edit)


def benign_kl(lm: LanguageModel, saes: Saes, forced: Sequence[Forced]) -> Callable[[Plan], float]:
    """A measure for matching controls: a plan's KL(base || steered) on these texts, nats per token."""
    return lambda plan: _or_nan(_cost_of(lm, saes, forced, plan).kl)


def _cost_of(lm: LanguageModel, saes: Saes, forced: Sequence[Forced], plan: Plan) -> Cost:
    arm = Arm(plan.name, BASELINE.kind, plan)
    return costs(lm, saes, [arm], forced)[plan.name]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _blocks(
    arms: Sequence[Arm], forced: Sequence[Forced], batch_rows: int
) -> Iterator[tuple[Sequence[Arm], Sequence[Forced]]]:
    """Arms x texts in blocks of at most `batch_rows` rows, the block's own baseline rows included."""
    group_size = max(1, min(len(arms), batch_rows - 1))
    n_texts = max(1, batch_rows // (group_size + 1))
    ordered = sorted(forced, key=lambda text: len(text.reply))
    for first in range(0, len(ordered), n_texts):
        for start in range(0, len(arms), group_size):
            yield arms[start : start + group_size], ordered[first : first + n_texts]


@dataclass
class _Tally:
    """Running sums of one arm."""

    kl: float = 0.0
    nll: float = 0.0
    agreed: int = 0
    scored: int = 0
    edit: float = 0.0
    touched: int = 0
    positions: int = 0

    def cost(self, n_prompts: int) -> Cost:
        return Cost(
            kl=_finite(self.kl / self.scored),
            top1_agreement=self.agreed / self.scored,
            edit_norm=_finite(self.edit / self.touched) if self.touched else 0.0,
            touched=self.touched / self.positions,
            n_tokens=self.scored,
            n_prompts=n_prompts,
            nll=_finite(self.nll / self.scored),
        )


def _finite(value: float) -> float | None:
    """A model that was pushed until it answers in NaN has no KL; a mean of NaNs is no measurement."""
    return value if math.isfinite(value) else None


def _tally_block(
    lm: LanguageModel, saes: Saes, arms: Sequence[Arm], texts: Sequence[Forced], tallies: dict[str, _Tally]
) -> None:
    """One forward of (baseline + arms) x texts, arm by arm compared with the baseline's rows."""
    rows = [(arm, text) for arm in (BASELINE, *arms) for text in texts]
    scored = teacher_force(lm, saes, rows)
    likelihoods = _log_likelihoods(scored, [text for _, text in rows], sorted(lm.eos_ids))
    base, mask = scored.log_probs[: len(texts)], scored.mask[: len(texts)]
    for i, arm in enumerate(arms, 1):
        part = slice(i * len(texts), (i + 1) * len(texts))
        steered, tally = scored.log_probs[part], tallies[arm.name]
        tally.kl += float((base.exp() * (base - steered)).sum(-1)[mask].double().sum())
        tally.nll -= sum(likelihoods[part])
        tally.agreed += int((base.argmax(-1) == steered.argmax(-1))[mask].sum())
        tally.scored += int(mask.sum())
        tally.positions += int(scored.lengths[part].sum())
        for receipt in scored.receipts[part]:
            if receipt is not None:
                tally.edit += receipt.edit_norm * receipt.tokens_touched
                tally.touched += receipt.tokens_touched


@dataclass(frozen=True, slots=True)
class Scored:
    """One teacher-forced pass. `log_probs[r, i]` predicts reply token i of row r (or its end); `mask` says which exist.

    `lengths` counts each row's real tokens; `receipts` are None for rows without a plan.
    """

    log_probs: Float[Tensor, "rows predicted vocab"]
    mask: Bool[Tensor, "rows predicted"]
    lengths: Int[Tensor, " rows"]
    receipts: list[Receipt | None]


@dataclass(frozen=True, slots=True)
class Presented:
    """Token ids of a text after a prompt, under a plan. `ended`: the end of the turn after it is scored as well."""

    plan: Plan | None
    prompt: Sequence[int]
    reply: Sequence[int]
    ended: bool = False


def teacher_force(lm: LanguageModel, saes: Saes, rows: Sequence[tuple[Arm, Forced]]) -> Scored:
    """Present each reply after its arm's prompt, in one forward; see `force_tokens`."""
    presented = [
        Presented(arm.plan, encode(lm, arm.messages(text.prompt)), text.reply, text.ended) for arm, text in rows
    ]
    return force_tokens(lm, saes, presented)


def force_tokens(lm: LanguageModel, saes: Saes, rows: Sequence[Presented]) -> Scored:
    """Present each text after its prompt, in one forward. Plans share what they cannot change (`prompt_sharing.py`).

    A block of one-token replies holds nothing for a scope 'generated' to cover, as in generation: callers refuse
    plans that could not act on any of their texts.
    """
    # The last token of a reply that was cut off predicts nothing that is scored, so it need not be computed.
    replies = [row.reply if row.ended else row.reply[:-1] for row in rows]
    texts = [(tuple(row.prompt), tuple(reply)) for row, reply in zip(rows, replies, strict=True)]
    shown, prompt_of = distinct(texts)
    ids, real, width = stack_rows([p for p, _ in shown], [r for _, r in shown], lm.pad_id, lm.device)
    predicted = ids.shape[1] - width + 1
    plans = [row.plan for row in rows]
    with steer(lm, plans, saes, prompt_width=width, prompt_of=prompt_of, require_reach=False) as steering:
        output = lm.model(
            input_ids=ids,
            attention_mask=real.long(),
            position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=predicted,
        )
        receipts = steering.receipts()
    counts = torch.tensor([len(row.reply) + row.ended for row in rows], device=lm.device)
    mask = torch.arange(predicted, device=lm.device) < counts[:, None]
    log_probs = output.logits.float().log_softmax(-1)[steering.row_map.row_of]
    return Scored(log_probs, mask, real.sum(1)[prompt_of.to(real.device)], receipts)


def stack_rows(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows columns"], Bool[Tensor, "rows columns"], int]:
    """Token ids, which of them are real, and the number of prompt columns."""
    width, tail = max(map(len, prompts)), max(map(len, replies))
    ids = torch.full((len(prompts), width + tail), pad_id, dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        span = slice(width - len(prompt), width + len(reply))
        ids[row, span] = torch.tensor([*prompt, *reply])
        real[row, span] = True
    return ids.to(device), real.to(device), width


def option_choices(
    lm: LanguageModel,
    saes: Saes,
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    *,
    ended: bool = False,
    batch_rows: int = BATCH_ROWS,
) -> tuple[OptionChoice, ...]:
    """Answer multiple-choice prompts by the likeliest option. Prompts without options are left out.

    By default an option may be the beginning of a reply ("Berlin is the capital of ..."), as lm-evaluation-harness
    scores it. With `ended` it is a whole reply and the end of the turn counts: for options of which one begins another,
    because "42" can never be likelier than the "4" that it begins with.
    Raises `ScopeError` for a plan that steers generated tokens only, `PromptSetError` when no prompt has options.
    """
    refuse_generated_scope(arms)
    asked = [prompt for prompt in prompts if prompt.options]
    if not asked:
        raise PromptSetError("none of these prompts has options", hint="multiple choice needs `options` and `answer`")
    pairs = [(arm, prompt) for prompt in asked for arm in arms]
    per_chunk = max(1, batch_rows // max(len(prompt.options) for prompt in asked))
    found: dict[tuple[str, str, str], OptionChoice] = {}
    for start in range(0, len(pairs), per_chunk):
        chunk = pairs[start : start + per_chunk]
        rows = [_continued(lm, arm, prompt, ended=ended) for arm, prompt in chunk]
        for (arm, prompt), values in zip(chunk, continuation_log_likelihoods(lm, saes, rows), strict=True):
            found[arm.name, prompt.suite, prompt.id] = _choice(arm.name, prompt, values)
    return tuple(found[arm.name, prompt.suite, prompt.id] for arm in arms for prompt in asked)


def _continued(lm: LanguageModel, arm: Arm, prompt: Prompt, *, ended: bool) -> Continued:
    options = tuple(tuple(lm.tokenizer.encode(option, add_special_tokens=False)) for option in prompt.options)
    return Continued(arm.plan, encode(lm, arm.messages(prompt)), options, ended)


def option_accuracy(choices: Sequence[OptionChoice]) -> dict[str, dict[str, Interval]]:
    """Share of items whose likeliest option is the answer, or the mean share of probability on the true options where
    the suite is scored by that (TruthfulQA mc2): arm -> suite -> interval."""
    found: defaultdict[str, defaultdict[str, list[OptionChoice]]] = defaultdict(lambda: defaultdict(list))
    for choice in choices:
        found[choice.arm][choice.suite].append(choice)
    return {arm: {suite: _score(of) for suite, of in suites.items()} for arm, suites in found.items()}


def _score(choices: Sequence[OptionChoice]) -> Interval:
    masses = [choice.mass for choice in choices if choice.mass is not None]
    if masses:
        return mean_interval(masses)
    return wilson(sum(choice.correct for choice in choices), len(choices))


def steers_generated(arm: Arm) -> bool:
    """Whether any edit of the arm's plan acts on generated tokens only."""
    return arm.plan is not None and any(edit.scope == "generated" for edit in arm.plan.all_edits)


def refuse_generated_scope(arms: Sequence[Arm]) -> None:
    """Raises `ScopeError` for an arm that steers generated tokens: likelihoods have none."""
    for arm in arms:
        if steers_generated(arm):
            raise ScopeError(
                f"arm '{arm.name}' steers generated tokens, and multiple choice generates none",
                hint="score by generation, or use the scope 'all', 'prompt' or 'assistant'",
            )


def _log_likelihoods(scored: Scored, texts: Sequence[Forced], end_ids: Sequence[int]) -> list[float]:
    """Log-likelihood of each reply, in nats, its end counted as any of the tokens that end a turn."""
    values = []
    for log_probs, text in zip(scored.log_probs, texts, strict=True):
        reply = torch.tensor(text.reply, device=log_probs.device, dtype=torch.long)
        total = log_probs[torch.arange(len(reply)), reply].sum()
        if text.ended:
            total = total + log_probs[len(reply), list(end_ids)].logsumexp(0)
        values.append(float(total))
    return values


def _choice(arm: str, prompt: Prompt, likelihoods: Sequence[float]) -> OptionChoice:
    """The likeliest option. What is not finite cannot win: a model that answers in NaN chose nothing, and is wrong."""
    finite = [i for i, value in enumerate(likelihoods) if math.isfinite(value)]
    chosen = prompt.options[max(finite, key=likelihoods.__getitem__)] if finite else ""
    correct = bool(finite) and chosen == prompt.answer
    mass = (option_mass(prompt, likelihoods) or 0.0) if prompt.meta.get("scoring") == "option-mass" else None
    return OptionChoice(arm, prompt.suite, prompt.id, tuple(likelihoods), chosen, correct, mass)
