"""A model under one plan, as evaluation frameworks see it: token ids in, replies or log-likelihoods out.

1. What a framework names in its model arguments (a model, a plan, an SAE) becomes one `SteeredModel`, checked against
   each other before anything runs.
2. Replies are generated and texts scored by the same functions as in our own runner: the same item gets the same score.
3. Every result carries its receipt. A plan that could not act is an error, never an unsteered score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from clampdown.errors import PlanError, ScopeError
from clampdown.evaluation.runner import check_acted
from clampdown.evaluation.utility import Presented, force_tokens
from clampdown.models.chat import pad_left
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, Reply, generate_batch
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan, read_plan
from clampdown.steering.program import check_plan
from clampdown.types import ArmKind, Message, Prompt, Receipt, Site

Ids = Sequence[int]
Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How replies are made. `temperature` 0 is greedy; anything else samples: from `seed`, or without one from a new
    seed each time the same is asked (0, 1, ...), so that repeats of a task's item are draws and not copies."""

    max_new_tokens: int = 256
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply, cut before the first stop string. `why` is "length" when it was cut off by the token limit."""

    text: str
    n_tokens: int
    why: Literal["stop", "length"]
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a text is after its prompt: nats, and whether greedy decoding would write it."""

    log_likelihood: float
    greedy: bool
    receipt: Receipt | None


@dataclass(frozen=True)
class SteeredModel:
    """A model, its SAEs, and the plan it runs under (None: the baseline)."""

    lm: LanguageModel
    saes: tuple[Sae, ...] = ()
    plan: Plan | None = None
    batch_rows: int = 64
    arm: Arm = field(init=False)
    _draws: Counter[tuple[tuple[int, ...], Decoding]] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        arm = BASELINE if self.plan is None else Arm(self.plan.name, ArmKind.FEATURE, self.plan)
        object.__setattr__(self, "arm", arm)

    @property
    def description(self) -> dict[str, Any]:
        """What identifies this model in another tool's results."""
        plan = self.plan
        return {
            "model": self.lm.name,
            "model_revision": self.lm.revision,
            "plan": None if plan is None else plan.name,
            "plan_digest": None if plan is None else plan.digest,
            "saes": [f"{sae.name}@{sae.revision}" for sae in self.saes],
        }

    def complete(
        self, prompts: Sequence[Ids], decoding: Decoding, progress: Progress | None = None
    ) -> list[Completion]:
        """A reply to each prompt, in order. Raises `SteeringNotAppliedError` and its kin."""
        done: list[Completion] = [Completion("", 0, "stop", None)] * len(prompts)
        for rows in _by_length(prompts, self.batch_rows if decoding.temperature == 0 else 1):
            batch = [(self.arm, _prompt(row), list(prompts[row])) for row in rows]
            replies = self._greedy(batch, decoding) if decoding.temperature == 0 else self._sampled(batch[0], decoding)
            check_acted(replies)
            for row, reply in zip(rows, replies, strict=True):
                done[row] = _completion(reply, decoding)
            if progress:
                progress(len(rows))
        return done

    def _greedy(self, batch: list[tuple[Arm, Prompt, list[int]]], decoding: Decoding) -> list[Reply]:
        return generate_batch(self.lm, list(self.saes), batch, decoding.max_new_tokens)

    def _sampled(self, row: tuple[Arm, Prompt, list[int]], decoding: Decoding) -> list[Reply]:
        """One reply, drawn by the library's own sampler: rows that share a batch would share its random numbers."""
        arm, prompt, ids = row
        inputs = pad_left([ids], self.lm.pad_id, self.lm.device)
        with (
            torch.random.fork_rng(devices=[self.lm.device] if self.lm.device.type == "cuda" else []),
            steer(self.lm, self.plan, list(self.saes), require_reach=False) as steering,
        ):
            torch.manual_seed(self._seed(ids, decoding))
            output = self.lm.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k or 0,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=self.lm.pad_id,
                eos_token_id=sorted(self.lm.eos_ids),
            )
            receipts = steering.receipts()
        tail = [token for token in output[0, len(ids) :].tolist() if token not in self.lm.eos_ids]
        text = self.lm.tokenizer.decode(tail, skip_special_tokens=True)
        return [Reply(arm, prompt, text, len(tail), receipts[0] if receipts else None)]

    def _seed(self, ids: Ids, decoding: Decoding) -> int:
        """The seed that was asked for, else how often the same was drawn before."""
        if decoding.seed is not None:
            return decoding.seed
        asked = (tuple(ids), decoding)
        self._draws[asked] += 1
        return self._draws[asked] - 1

    def log_likelihoods(self, pairs: Sequence[tuple[Ids, Ids]], progress: Progress | None = None) -> list[Likelihood]:
        """Of each (prompt, text), in order. Raises `ScopeError` for a plan that steers generated tokens."""
        self.refuse_generated_scope()
        done: list[Likelihood] = [Likelihood(0.0, True, None)] * len(pairs)
        for rows in _by_length([[*prompt, *text] for prompt, text in pairs], self.batch_rows):
            for row, found in zip(rows, self._scored([pairs[row] for row in rows]), strict=True):
                done[row] = found
            if progress:
                progress(len(rows))
        return done

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        with torch.inference_mode():
            rows = [Presented(self.plan, prompt, text) for prompt, text in pairs]
            scored = force_tokens(self.lm, list(self.saes), rows)
            found = []
            for (_, text), log_probs, receipt in zip(pairs, scored.log_probs, scored.receipts, strict=True):
                wanted = torch.tensor(list(text), device=log_probs.device)
                predicted = log_probs[: len(text)]
                value = float(predicted.gather(1, wanted[:, None]).sum())
                found.append(Likelihood(value, bool((predicted.argmax(-1) == wanted).all()), receipt))
        check_acted([Reply(self.arm, _prompt(i), "", 0, row.receipt) for i, row in enumerate(found)])
        return found

    def refuse_generated_scope(self) -> None:
        """Raise `ScopeError` for a plan that acts on generated tokens: log-likelihoods generate none."""
        if self.plan and any(edit.scope == "generated" for edit in self.plan.all_edits):
            raise ScopeError(
                f"plan '{self.plan.name}' steers generated tokens, and log-likelihoods generate none",
                hint="choose tasks that generate, or a plan with the scope 'all', 'prompt' or 'assistant'",
            )

    def refuse_prompt_scope(self) -> None:
        """Raise `ScopeError` for a plan that needs a prompt: running text has none to read a gate from or to steer."""
        plan = self.plan
        if plan and (plan.gate or any(edit.scope != "all" for edit in plan.edits)):
            what = "has a gate" if plan.gate else "steers part of a conversation"
            raise ScopeError(
                f"plan '{plan.name}' {what}, and the likelihood of running text has no prompt to tell it by",
                hint="use a plan without a gate and with the scope 'all' for perplexity tasks",
            )


def load_steered(
    model: str | None = None,
    plan: str | Path | None = None,
    sae: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_rows: int = 64,
) -> SteeredModel:
    """The model (default: the plan's, else the embedded one) under a plan file (None: the baseline).

    Raises `PlanError`, `ModelError`, `SaeError` and their kin, `PlanMismatchError` when they do not belong together.
    """
    if batch_rows < 1:
        raise PlanError(f"a batch needs at least one row, got {batch_rows}")
    found = None if plan is None else read_plan(Path(plan))
    lm = load_model(model or (found.model.name if found else "organism"), device=device, dtype=dtype)
    if found is None:
        return SteeredModel(lm, batch_rows=batch_rows)
    saes = tuple(load_sae(sae or ref.name, device=str(lm.device), site=Site.parse(ref.site)) for ref in found.saes)
    check_plan(found, lm, {loaded.cfg.site.name: loaded for loaded in saes})
    return SteeredModel(lm, saes, found, batch_rows)


def _prompt(row: int) -> Prompt:
    """What our own loops want beside token ids: a name for error messages."""
    return Prompt(f"request {row}", (Message("user", ""),), "requests")


def _by_length(sequences: Sequence[Ids], batch_rows: int) -> Iterator[list[int]]:
    """Indices in batches of about equal length, longest first."""
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    for start in range(0, len(order), batch_rows):
        yield order[start : start + batch_rows]


def _completion(reply: Reply, decoding: Decoding) -> Completion:
    cuts = [at for stop in decoding.stops if stop and (at := reply.text.find(stop)) >= 0]
    why = "stop" if cuts or reply.n_tokens < decoding.max_new_tokens else "length"
    return Completion(reply.text[: min(cuts)] if cuts else reply.text, reply.n_tokens, why, reply.receipt)
