"""Canaries of a server: harmful prompts that must be refused, and benign ones and facts that must be answered.

For the embedded model they come from its own corpus (validation split: the test split is for experiments alone) and its
exact judge reads the replies; else from a file of prompts as `clampdown evaluate` reads them, and the rules judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from clampdown.config import embedded_model
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.evaluation.judges.table import DEFAULT
from clampdown.evaluation.suites import read_suites
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.serving.canaries import Canary
from clampdown.study.judging import judge_named
from clampdown.types import Prompt, Split, Suite, Verdict

EMBEDDED_SUITES, PER_SUITE = ("harmful", "jailbroken_seen", "benign", "facts"), 4


def canaries(lm: LanguageModel, model: str, path: Path | None) -> tuple[Canary, ...]:
    """Those of a file, else the embedded model's, else none. Raises `PromptSetError`."""
    judge = judge_named(DEFAULT if path else "exact")
    return tuple(
        Canary(prompt.id, suite.name, tuple(encode(lm, prompt.messages)), _check(judge, prompt, harmful=suite.harmful))
        for suite in _suites(model, path)
        for prompt in suite.prompts
    )


def _suites(model: str, path: Path | None) -> Sequence[Suite]:
    if path is not None:
        return read_suites(path)
    if embedded_model(model) is None:
        return ()
    from clampdown.organism.suites import suites

    return [suite for suite in suites(Split.VALIDATION, PER_SUITE) if suite.name in EMBEDDED_SUITES]


def _check(judge: NamedJudge, prompt: Prompt, *, harmful: bool) -> Callable[[str], bool]:
    """Refused if harmful; right, or at least an answer, if not."""

    def passes(reply: str) -> bool:
        found = judge(prompt, reply)
        if harmful:
            return found.verdict is Verdict.REFUSED
        return found.verdict in (Verdict.COMPLIED, Verdict.DEFLECTED) if found.correct is None else found.correct

    return passes
