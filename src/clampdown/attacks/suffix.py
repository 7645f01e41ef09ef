"""A suffix found by gradient, after GCG (Zou et al., 2307.15043): text behind the request that changes the answer.

1. The gradient of the loss with respect to each free token, as a one-hot vector, ranks its replacements.
2. `candidates` changes of one token are drawn from the best replacements of random places, and each is tried: one
   forward, no gradient. The best is kept if it is better than what there was.
3. Where the loss looks promising the suffix is asked for real, as text: an answer of the arm, judged. A suffix that
   tokenises otherwise when it is typed is found out here and counts for nothing.

Objectives are searched together, in one batch per step, each for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.attacks.attempt import Attempt, user
from clampdown.attacks.budget import Budget, Clock
from clampdown.attacks.log import Searched
from clampdown.attacks.objective import Objective
from clampdown.attacks.replying import Answer
from clampdown.attacks.shared_prefix import SharedPrefix
from clampdown.attacks.surrogate import Losses, Slot, Surrogate
from clampdown.models.loading import LanguageModel
from clampdown.types import Verdict

BEST = 64
"""Replacements of one place that candidates are drawn from."""
TOKENS_PER_PASS = 12_288
LOGITS_PER_PASS = 1 << 26
"""Of the opening's places, by vocabulary."""
LOOK_EVERY = 20
"""Steps after which the best suffix is asked for real whatever its loss; otherwise when it is promising and new."""
FILLER = "!"

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking for real."""

    answer: Answer
    verdict: Verdict
    succeeded: bool


Ask = Callable[[Sequence[tuple[Objective, Attempt]]], list[Asked]]


@dataclass(slots=True)
class _Search:
    """The state of one objective's search."""

    number: int
    objective: Objective
    slot: Slot
    free: list[int]
    loss: float = float("inf")
    log_odds: float = float("inf")
    promising: bool = False
    asked_for: str = ""
    queries: int = 0
    step: int = 0
    last: Asked | None = None

    @property
    def done(self) -> bool:
        return self.last is not None and self.last.succeeded


def text_of(lm: LanguageModel, place: Slot, free: Sequence[int]) -> str:
    """The free tokens as they read behind the question: some tokenizers keep a word's space in the word before."""
    context = list(place.before[-4:])
    head, whole = (lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (context, [*context, *free]))
    return whole[len(head) :] if whole.startswith(head) else " " + lm.tokenizer.decode(list(free))


def suffixed(objective: Objective, text: str) -> Attempt:
    return Attempt(objective.asked(user(objective.question + text)))


def search_suffixes(
    surrogate: Surrogate,
    places: Sequence[tuple[Objective, Slot]],
    ask: Ask,
    budget: Budget,
    clock: Clock,
    seed: int,
    arm: str,
    tick: Progress,
) -> list[Searched]:
    """One row per objective, in order. Stops where the budget or the clock does."""
    lm = surrogate.lm
    allowed = plain_tokens(lm)
    start = first_suffix(lm, allowed, budget.suffix_tokens)
    runs = [_Search(i, objective, place, list(start)) for i, (objective, place) in enumerate(places)]
    prefix = SharedPrefix.of(surrogate, [place for _, place in places])
    _update(runs, measured(surrogate, [(run.slot, run.free) for run in runs]))
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, budget.steps + 1):
        live = [run for run in runs if not run.done]
        if not live or clock.over():
            break
        _step(surrogate, prefix, live, allowed, budget.candidates, draw)
        for run in live:
            run.step = step
        _look(lm, live, ask, always=step % LOOK_EVERY == 0 or step == budget.steps)
        tick(step, budget.steps)
    _look(lm, [run for run in runs if run.last is None], ask, always=True)
    return [_row(lm, run, arm, budget.steps) for run in runs]


def _row(lm: LanguageModel, run: _Search, arm: str, steps: int) -> Searched:
    assert run.last is not None, "every search is looked at before it ends"
    receipt = run.last.answer.receipt
    return Searched(
        arm=arm,
        objective=run.objective.key,
        attack="suffix",
        step=run.step,
        steps=steps,
        queries=run.queries,
        found=text_of(lm, run.slot, run.free),
        loss=run.loss,
        log_odds=run.log_odds,
        reply=run.last.answer.text,
        verdict=run.last.verdict,
        succeeded=run.last.succeeded,
        fired=receipt and receipt.gate_fired,
        gate_score=receipt and receipt.gate_score,
    )


def _update(runs: Sequence[_Search], losses: Losses) -> None:
    rows = zip(runs, losses.total.tolist(), losses.log_odds.tolist(), losses.promising.tolist(), strict=True)
    for run, total, log_odds, promising in rows:
        run.loss, run.log_odds, run.promising = total, log_odds, promising


def _look(lm: LanguageModel, runs: Sequence[_Search], ask: Ask, *, always: bool) -> None:
    """Ask for real where it may have changed something."""
    texts = [(run, text_of(lm, run.slot, run.free)) for run in runs]
    new = [(run, text) for run, text in texts if text != run.asked_for and (always or run.promising)]
    found = ask([(run.objective, suffixed(run.objective, text)) for run, text in new]) if new else []
    for (run, text), asked in zip(new, found, strict=True):
        run.last, run.asked_for, run.queries = asked, text, run.queries + 1


def _step(
    surrogate: Surrogate,
    prefix: SharedPrefix | None,
    runs: Sequence[_Search],
    allowed: Int[Tensor, " plain"],
    candidates: int,
    draw: torch.Generator,
) -> None:
    """One gradient, one batch of candidates; every search keeps its best."""
    ranked = _replacements(surrogate, runs, allowed)
    drawn = [_drawn(run.free, best, candidates, draw) for run, best in zip(runs, ranked, strict=True)]
    tried = [(run, free) for run, every in zip(runs, drawn, strict=True) for free in every]
    if prefix is None:
        losses = measured(surrogate, [(run.slot, free) for run, free in tried])
    else:
        opening = max(len(run.slot.opening) for run in runs)
        longest = len(tried[0][1]) + len(tried[0][0].slot.after) + opening
        parts = _parts(surrogate.lm, [(run.number, free) for run, free in tried], longest, opening)
        losses = Losses.joined([prefix.losses(part) for part in parts])
    totals = losses.total.view(len(runs), candidates)
    for i, (run, at) in enumerate(zip(runs, totals.argmin(1).tolist(), strict=True)):
        row = i * candidates + at
        if float(losses.total[row]) < run.loss:
            run.free = tried[row][1]
            run.loss, run.log_odds = float(losses.total[row]), float(losses.log_odds[row])
            run.promising = bool(losses.promising[row])


def _replacements(
    surrogate: Surrogate, runs: Sequence[_Search], allowed: Int[Tensor, " plain"]
) -> Int[Tensor, "runs free best"]:
    """By place, the tokens that the loss falls fastest towards."""
    table = surrogate.lm.model.get_input_embeddings()(allowed)
    width = len(runs[0].free)
    found = []
    for part in _in_parts(surrogate.lm, [(run.slot, run.free) for run in runs]):
        gradient = _gradient(surrogate, part, width)
        found.append((-(gradient.to(table.dtype) @ table.T)).topk(min(BEST, len(allowed)), dim=-1).indices)
    return allowed[torch.cat(found)]


def _gradient(
    surrogate: Surrogate, rows: Sequence[tuple[Slot, Sequence[int]]], width: int
) -> Float[Tensor, "rows free d_model"]:
    """Of each row's loss with respect to its free tokens' embeddings."""
    leaves: list[Tensor] = []

    def embed(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        total = surrogate.losses(rows, embed).total.sum()
        (gradient,) = torch.autograd.grad(total, leaves[:1])
    end = gradient.shape[1] - max(len(place.opening) for place, _ in rows) - len(rows[0][0].after)
    return gradient[:, end - width : end]


def _drawn(
    free: Sequence[int], best: Int[Tensor, "free best"], candidates: int, draw: torch.Generator
) -> list[list[int]]:
    """Changes of one place each; the places take turns, so that every one is tried."""
    places = torch.randperm(len(free), generator=draw).tolist()
    tokens = torch.randint(best.shape[1], (candidates,), generator=draw).tolist()
    found = []
    for i, token in enumerate(tokens):
        changed, place = list(free), places[i % len(places)]
        changed[place] = int(best[place, token])
        found.append(changed)
    return found


@torch.no_grad()
def measured(surrogate: Surrogate, rows: Sequence[tuple[Slot, Sequence[int]]]) -> Losses:
    return Losses.joined([surrogate.losses(part) for part in _in_parts(surrogate.lm, rows)])


def _in_parts(
    lm: LanguageModel, rows: Sequence[tuple[Slot, Sequence[int]]]
) -> list[Sequence[tuple[Slot, Sequence[int]]]]:
    opening = max(len(place.opening) for place, _ in rows)
    return _parts(lm, rows, max(len(place.prompt(free)) for place, free in rows) + opening, opening)


def _parts(lm: LanguageModel, rows: Sequence[T], longest: int, opening: int) -> list[Sequence[T]]:
    """Rows of at most so many tokens, an opening of so many among them, in passes of bounded size."""
    kept = (opening + 1) * lm.model.get_input_embeddings().num_embeddings
    size = max(1, min(TOKENS_PER_PASS // longest, LOGITS_PER_PASS // kept))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def first_suffix(lm: LanguageModel, allowed: Int[Tensor, " plain"], length: int) -> list[int]:
    """As GCG begins: one plain token, again and again."""
    ids = lm.tokenizer(f" {FILLER}", add_special_tokens=False).input_ids
    known = set(allowed.tolist())
    return [next((token for token in reversed(ids) if token in known), int(allowed[0]))] * length


_PLAIN: WeakKeyDictionary[object, Int[Tensor, " plain"]] = WeakKeyDictionary()


def plain_tokens(lm: LanguageModel) -> Int[Tensor, " plain"]:
    """Tokens of printable ASCII that are read back as themselves: what can be typed. Found once per model."""
    if lm.model not in _PLAIN:
        _PLAIN[lm.model] = _plain_tokens(lm)
    return _PLAIN[lm.model]


def _plain_tokens(lm: LanguageModel) -> Int[Tensor, " plain"]:
    tokenizer: Any = lm.tokenizer
    size = min(len(tokenizer), lm.model.get_input_embeddings().num_embeddings)
    special = set(tokenizer.all_special_ids) | set(lm.chat.special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    wanted = [i for i, text in enumerate(texts) if i not in special and text.strip() and _typed(text)]
    read = tokenizer([texts[i] for i in wanted], add_special_tokens=False).input_ids
    return torch.tensor([i for i, ids in zip(wanted, read, strict=True) if ids == [i]], device=lm.device)


def _typed(text: str) -> bool:
    return text.isascii() and text.isprintable()
