"""Screening: hundreds of plans measured without generating, so that only the best generate.

1. One forward over a prompt per plan (`discovery.screening.Screen`: what plans share is computed once) gives the
   refusal log-odds of the first reply token on harmful prompts and, on benign ones, KL(unsteered || steered) there.
2. Successive halving (Jamieson and Talwalkar, 1502.07943): all plans on few prompts, the best quarter on four times as
   many, until `keep` are left. A plan whose benign KL exceeds the limit is dropped whatever it gains.
3. Every plan that was dropped says where and why: a report shows them beside what was generated.

The first token is not the reply: a plan that breaks the model later looks good here. Screening decides what is worth
generating, never what is chosen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.discovery.screening import PrefillRefusal, Screen, Text
from clampdown.errors import NotEnoughDataError, PromptSetError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan
from clampdown.steering.prompt_sharing import first_alike
from clampdown.types import Prompt

DECIDED = 4.0
"""Refusal log-odds in nats (a probability of 0.98) from which on the first token counts as a refusal, however sure."""

Ids = Sequence[int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Reading:
    """What prefills say of a plan: mean change of the refusal log-odds on harmful prompts, and mean KL of the first
    token's distribution on benign prompts, both in nats.

    Log-odds above `DECIDED` count as that: a plan gains nothing on prompts that are refused already, and must not look
    bad for making a certain refusal a little less certain.
    """

    gain: float
    kl: float


class Prefills:
    """Measure: plans -> readings, on the first n harmful and the first n benign prompts.

    A prefill cannot tell the scope "all" from "prompt": plans that differ in nothing else are read once.
    """

    def __init__(
        self, lm: LanguageModel, sae: Sae | None, harmful: Sequence[Ids], benign: Sequence[Ids], tokens: RefusalTokens
    ) -> None:
        """Raises `PromptSetError` when either kind of prompt is missing."""
        if not harmful or not benign:
            raise PromptSetError("screening needs harmful prompts (what is gained) and benign ones (what it costs)")
        self._lm, self._sae, self._tokens = lm, sae, tokens
        self._harmful, self._benign = [Text(tuple(p)) for p in harmful], [Text(tuple(p)) for p in benign]
        self._screens: dict[int, _Sample] = {}

    @property
    def n_prompts(self) -> int:
        return max(len(self._harmful), len(self._benign))

    def __call__(self, plans: Sequence[Plan], n: int, on_progress: Progress | None = None) -> list[Reading]:
        if n not in self._screens:
            texts = [*self._harmful[:n], *self._benign[:n]]
            screen = Screen(self._lm, self._sae, texts)
            self._screens[n] = _Sample(screen, min(n, len(self._harmful)), self._tokens)
        alike = first_alike([_at_prefill(plan).digest for plan in plans])
        distinct = sorted(set(alike))
        read = dict(zip(distinct, self._screens[n].read([plans[i] for i in distinct], on_progress), strict=True))
        return [read[i] for i in alike]


def _at_prefill(plan: Plan) -> Plan:
    """The plan as a prefill sees it."""
    edits = (edit.changed(scope="prompt") if edit.scope == "all" else edit for edit in plan.edits)
    return plan.changed(edits=tuple(edits))


class _Sample:
    """Some of the prompts, the harmful ones first, with the unsteered model's first tokens."""

    def __init__(self, screen: Screen, n_harmful: int, tokens: RefusalTokens) -> None:
        self._screen, self._n_harmful, self._tokens = screen, n_harmful, tokens
        self._base = {block.texts: logits[0, :, -1].float() for block, _, logits in screen.logits([None])}

    def read(self, plans: Sequence[Plan], on_progress: Progress | None) -> list[Reading]:
        gain = torch.zeros(len(plans), dtype=torch.float64)
        kl = torch.zeros(len(plans), dtype=torch.float64)
        self._screen.on_progress = on_progress
        for block, chunk, logits in self._screen.logits(plans):
            harmful = torch.tensor([i < self._n_harmful for i in block.texts])
            base, steered = self._base[block.texts], logits[:, :, -1].float()
            odds = refusal_log_odds(steered.flatten(0, 1), self._tokens).view(len(chunk), -1)
            change = odds.clamp(max=DECIDED) - refusal_log_odds(base, self._tokens).clamp(max=DECIDED)
            gain[chunk.start : chunk.stop] += change[:, harmful].double().sum(1).cpu()
            base_log = base[~harmful].log_softmax(-1)
            distance = base_log.exp() * (base_log - steered[:, ~harmful].log_softmax(-1))
            kl[chunk.start : chunk.stop] += distance.sum(-1).double().sum(1).cpu()
        n_benign = len(self._screen.texts) - self._n_harmful
        return [Reading(g / self._n_harmful, k / n_benign) for g, k in zip(gain.tolist(), kl.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class Screened:
    """A candidate and how far it came. `dropped` says why it was not kept ("" when it was); `n_prompts` is how many
    prompts of each kind its last reading is from."""

    plan: Plan
    reading: Reading
    n_prompts: int
    dropped: str = ""

    def facts(self) -> dict[str, Any]:
        """Plain values for a run directory."""
        edit = self.plan.edits[0]
        return {
            "plan": self.plan.name,
            "features": list(edit.features),
            "strength": edit.strengths[0],
            "scope": edit.scope,
            **{name: value if math.isfinite(value) else None for name, value in asdict(self.reading).items()},
            "n_prompts": self.n_prompts,
            "dropped": self.dropped,
        }


@dataclass(frozen=True, slots=True)
class Halving:
    """How candidates are narrowed down: `keep` in the end, all of them on `first` prompts of each kind, then the best
    1/`factor` on `factor` times as many. `kl_limit` is in nats at the first token of benign prompts."""

    keep: int = 8
    first: int = 8
    factor: int = 4
    kl_limit: float | None = None

    def rungs(self, n_candidates: int, n_prompts: int) -> list[tuple[int, int]]:
        """(prompts of each kind, candidates that stay) of every rung. The last one keeps `keep`."""
        rungs, prompts, left = [], min(self.first, n_prompts), n_candidates
        while prompts < n_prompts and left > self.keep:
            left = max(self.keep, left // self.factor)
            rungs.append((prompts, left))
            prompts = min(prompts * self.factor, n_prompts)
        return [*rungs, (prompts, min(self.keep, left))]


def screen(
    plans: Sequence[Plan],
    measure: Callable[[Sequence[Plan], int], Sequence[Reading]],
    n_prompts: int,
    halving: Halving | None = None,
    on_progress: Progress | None = None,
) -> list[Screened]:
    """Every candidate with its last reading: the kept ones first, best first, then the dropped, latest first.

    `measure(plans, n)` reads plans on the first n prompts of each kind. `on_progress(done, total)` counts
    (plan, prompt) pairs. Raises `NotEnoughDataError` without candidates.
    """
    if not plans:
        raise NotEnoughDataError("no candidate plans to screen")
    halving = halving or Halving()
    rungs = halving.rungs(len(plans), n_prompts)
    sizes = [len(plans), *(kept for _, kept in rungs[:-1])]
    total, done = sum(size * prompts for size, (prompts, _) in zip(sizes, rungs, strict=True)), 0
    alive, dropped = list(plans), []
    kept: list[Screened] = []
    for prompts, stay in rungs:
        read = [Screened(p, r, prompts) for p, r in zip(alive, measure(alive, prompts), strict=True)]
        kept, out = _rung(read, stay, halving.kl_limit)
        dropped = out + dropped
        done += len(alive) * prompts
        alive = [each.plan for each in kept]
        if on_progress:
            on_progress(done, total)
        if not alive:
            break
    return [*kept, *dropped]


def _rung(read: Sequence[Screened], stay: int, kl_limit: float | None) -> tuple[list[Screened], list[Screened]]:
    """Who goes on, best first, and who does not, with the reason."""
    limit = math.inf if kl_limit is None else kl_limit
    costly = [
        replace(each, dropped=f"benign KL {each.reading.kl:.2f} above {limit:g} nats")
        for each in read
        if not each.reading.kl <= limit  # a model pushed into NaN is too costly as well
    ]
    fair = sorted((each for each in read if each.reading.kl <= limit), key=lambda each: -each.reading.gain)
    weak = [
        replace(each, dropped=f"rank {rank} of {len(read)} by refusal log-odds on {each.n_prompts} prompts")
        for rank, each in enumerate(fair[stay:], stay + 1)
    ]
    return fair[:stay], [*weak, *costly]


def prefills_of(
    lm: LanguageModel,
    sae: Sae | None,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    tokens: RefusalTokens,
    *,
    seed: int = 0,
) -> Prefills:
    """The measure for prompts of suites, in an order in which the first few stand for all: harmful prompts spread
    evenly from those that the unsteered model surely answers to those that it surely refuses, benign ones shuffled."""
    asked = [encode(lm, prompt.messages) for prompt in harmful]
    odds = PrefillRefusal(lm, sae, harmful, tokens).baseline.tolist() if harmful else []
    by_odds = sorted(range(len(asked)), key=odds.__getitem__)
    mixed = [encode(lm, prompt.messages) for prompt in benign]
    random.Random(seed).shuffle(mixed)
    return Prefills(lm, sae, [asked[by_odds[i]] for i in spread_order(len(asked))], mixed, tokens)


def spread_order(n: int) -> list[int]:
    """0 to n - 1 in an order whose beginnings cover the range evenly (van der Corput): the middle of the range, its
    start, then the middles of its halves, and so on."""
    bits = max(1, (n - 1).bit_length())
    turned = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits)]
    return sorted(range(n), key=lambda i: turned[round(i * (1 << bits) / n) ^ (1 << bits >> 1)])
