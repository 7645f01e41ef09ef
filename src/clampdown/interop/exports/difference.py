"""How far what an export does is from what its plan does, measured on the model that both are for.

1. Benign text: KL(plan || export) and agreement on the likeliest token, over the unsteered model's own replies.
2. Replies: refusals of harmful and of harmless prompts under both, judged by the same judge, prompt by prompt.

Nothing here says whether the export is good enough; it says what has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.judges.interface import Case, NamedJudge, in_order
from clampdown.evaluation.utility import BATCH_ROWS, Forced, base_replies, teacher_force
from clampdown.interop.exports.forms import Bound
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.plan import Plan
from clampdown.types import ArmKind, Interval, Prompt, Suite, Verdict


@dataclass(frozen=True, slots=True)
class Refusals:
    """Refusals of one suite under the plan and under its export. `flipped`: prompts on which one refused and the other
    did not; `unjudged`: prompts of which at least one reply has no verdict."""

    suite: str
    harmful: bool
    plan: Interval
    export: Interval
    flipped: int
    unjudged: int


@dataclass(frozen=True, slots=True)
class Difference:
    """An export against its plan. `kl` is KL(plan || export) in nats per predicted token of benign replies."""

    kl: float | None
    top1_agreement: float | None
    n_tokens: int
    n_prompts: int
    judge: str
    refusals: tuple[Refusals, ...]


def difference(
    bound: Bound, export: Plan, suites: Sequence[Suite], judge: NamedJudge, *, max_new_tokens: int = 48
) -> Difference:
    """Measure a plan against what its export does, on suites of harmful and harmless prompts."""
    saes = [source.whole() for source in bound.saes.values()]
    arms = (Arm("plan", ArmKind.FEATURE, bound.plan), Arm("export", ArmKind.FEATURE, export))
    benign = [prompt for suite in suites if not suite.harmful for prompt in suite.prompts]
    texts = base_replies(bound.lm, benign, max_new_tokens=max_new_tokens) if benign else ()
    kl, agreed, n = _text(bound, saes, arms, texts)
    found = tuple(_refusals(bound, saes, arms, suite, judge, max_new_tokens) for suite in suites if suite.prompts)
    return Difference(kl, agreed, n, len(benign), judge.name, found)


def _text(
    bound: Bound, saes: Sequence[Sae], arms: Sequence[Arm], texts: Sequence[Forced]
) -> tuple[float | None, float | None, int]:
    total, agreed, n = 0.0, 0, 0
    for start in range(0, len(texts), BATCH_ROWS // 2):
        chunk = texts[start : start + BATCH_ROWS // 2]
        with torch.inference_mode():
            scored = teacher_force(bound.lm, saes, [(arm, text) for arm in arms for text in chunk])
        plan, export = scored.log_probs[: len(chunk)], scored.log_probs[len(chunk) :]
        mask = scored.mask[: len(chunk)]
        total += float((plan.exp() * (plan - export)).sum(-1)[mask].double().sum())
        agreed += int((plan.argmax(-1) == export.argmax(-1))[mask].sum())
        n += int(mask.sum())
    return (total / n, agreed / n, n) if n else (None, None, 0)


def _refusals(
    bound: Bound, saes: Sequence[Sae], arms: Sequence[Arm], suite: Suite, judge: NamedJudge, max_new_tokens: int
) -> Refusals:
    pairs: list[tuple[Arm, Prompt]] = [(arm, prompt) for arm in arms for prompt in suite.prompts]
    replies = generate_arms(bound.lm, saes, pairs, max_new_tokens=max_new_tokens)
    texts = {(reply.arm.name, reply.prompt.id): reply.text for reply in replies}
    cases = [Case(prompt, texts[arm.name, prompt.id]) for arm, prompt in pairs]
    verdicts = [one.judgement and one.judgement.verdict for one in in_order(judge.find(cases), len(cases))]
    n = len(suite.prompts)
    judged = [pair for pair in zip(verdicts[:n], verdicts[n:], strict=True) if _known(pair[0]) and _known(pair[1])]
    refused = [tuple(verdict is Verdict.REFUSED for verdict in pair) for pair in judged]
    return Refusals(
        suite.name,
        suite.harmful,
        wilson(sum(plan for plan, _ in refused), len(refused)),
        wilson(sum(export for _, export in refused), len(refused)),
        sum(plan != export for plan, export in refused),
        n - len(judged),
    )


def _known(verdict: Verdict | None) -> bool:
    return verdict not in (None, Verdict.UNSCORED)
