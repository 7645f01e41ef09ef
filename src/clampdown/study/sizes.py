"""How much a study reads: prompts per suite at every stage, and how much of what is found is carried on.

| size | test prompts per suite | methods |
|---|---|---|
| quick | 20 | the sweep of the found clamp, for a first look |
| small | 60 | the same |
| medium | 60 | and both papers' methods, dense baselines, the gated set of features, 20 random features |
| full | 120 | the same as medium |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clampdown.errors import PromptSetError
from clampdown.evaluation.engines import Engine


@dataclass(frozen=True, slots=True)
class Answering:
    """How much the arms answer: prompts per suite for generation and for KL, rows per batch, tokens per reply,
    and the engine that writes replies (None: this process)."""

    per_suite: int
    kl_prompts: int
    batch_rows: int | None = None
    max_new_tokens: int = 40
    control_prompts: int | None = None
    """Prompts per suite for controls that steer, where they answer fewer than the other arms."""
    compared_prompts: int | None = None
    """Prompts per suite for what is neither unsteered nor a plan of one's own: published methods, dense baselines."""
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Prompts per suite that each stage reads: discovery, validation (choices), causal checks, and `calibration` benign
    prompts for gates; `finalists` features are swept; `answering` is the test."""

    discovery: int
    validation: int
    causal_prompts: int
    finalists: int
    calibration: int
    answering: Answering
    methods: bool = False
    """Whether all methods are compared, or the found clamp alone is swept."""
    n_random: int = 20
    """Random features at the methods' benign KL."""
    search_flops: float = 1e13
    """What a search over single features may cost, in floating-point operations; only large models feel it."""

    def scaled(self, factor: float) -> Sizes:
        """The same with that share of the prompts, at least a handful of each."""

        def part(n: int, least: int = 8) -> int:
            return max(min(n, least), round(factor * n))

        answering = replace(
            self.answering, per_suite=part(self.answering.per_suite), kl_prompts=part(self.answering.kl_prompts)
        )
        return replace(
            self,
            discovery=part(self.discovery, 24),
            validation=part(self.validation),
            causal_prompts=part(self.causal_prompts),
            calibration=part(self.calibration, 60),
            n_random=part(self.n_random, 5),
            answering=answering,
        )


QUICK = Sizes(120, 10, causal_prompts=8, finalists=1, calibration=800, answering=Answering(20, 20))
SMALL = Sizes(240, 20, causal_prompts=12, finalists=2, calibration=1600, answering=Answering(60, 60))
MEDIUM = replace(SMALL, methods=True)
FULL = replace(MEDIUM, validation=40, answering=Answering(120, 60), search_flops=4e13)
SIZES = {"quick": QUICK, "small": SMALL, "medium": MEDIUM, "full": FULL}


def size_named(name: str) -> Sizes:
    """Raises `PromptSetError` for a size that there is not."""
    if name not in SIZES:
        raise PromptSetError(f"'{name}' is not a size of study", hint=f"one of: {', '.join(SIZES)}")
    return SIZES[name]
