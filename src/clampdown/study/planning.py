"""What a study will take, said before it begins, and sizes that fit a time.

1. A study is counted in two things: prompts that are read (a prefill) and replies that are written (a prefill and the
   reply's tokens). How many there will be follows from its sizes and from how many prompts there are.
2. A few of each are timed on this model and machine. Steered arms share prefills and replies, so that the product is
   an upper bound.
3. `fitted` scales the sizes down until the bound fits the minutes; `Clock` does it once more before the test, by what
   is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.study.estimate import duration
from clampdown.study.methods.table import METHODS
from clampdown.study.run import StudyRequest
from clampdown.study.sizes import Sizes
from clampdown.study.study import Study
from clampdown.study.sweeping import OTHER_MULTIPLES, SCOPES, TEST_MULTIPLES, VALIDATION_MULTIPLES
from clampdown.types import ATTACKS, SAFE, PromptRole, Split

SAMPLE = 8
STEPS = 24
MATCHING_STEPS = 6
"""Sizes that are tried, each a tenth smaller than the one before."""
METHOD_ARMS = {"clamp": 5, "refine": 5, "dense": 5, "cast": 5, "gated-set": 2, "two-sided": 2}
"""Arms that a method shows to validation prompts."""
READ_PER_METHOD = {"clamp": 40, "refine": 60, "dense": 4, "cast": 8, "gated-set": 220, "two-sided": 8}
"""Prefills of a method's search for every causal prompt, about."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a study: prompts that it reads, replies that it writes."""

    name: str
    reads: int
    replies: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per prompt that is read, and per reply that is written, on this model and machine."""

    read: float
    reply: float

    def of(self, stage: Stage) -> float:
        return self.read * stage.reads + self.reply * stage.replies


@dataclass(frozen=True, slots=True)
class Outline:
    """A study's stages at their sizes, and what they take at most."""

    sizes: Sizes
    stages: tuple[Stage, ...]
    speed: Speed

    @property
    def seconds(self) -> float:
        return sum(map(self.speed.of, self.stages))

    def lines(self) -> Iterator[str]:
        """For people, a line per stage."""
        for stage in self.stages:
            parts = [f"{stage.reads:,} prompts read"] if stage.reads else []
            parts += [f"{stage.replies:,} replies"] if stage.replies else []
            yield f"{stage.name}: {', '.join(parts)}, about {duration(self.speed.of(stage))}"
        yield f"together at most about {duration(self.seconds)}"


def outline(study: Study, request: StudyRequest, speed: Speed) -> Outline:
    """What a request comes to."""
    return Outline(request.sizes, tuple(_stages(study, request)), speed)


def _stages(study: Study, request: StudyRequest) -> Iterator[Stage]:
    sizes, data = request.sizes, study.data

    def count(split: Split, n: int, *roles: PromptRole) -> int:
        return len(data.prompts(split, n, *roles))

    read = count(Split.DISCOVERY, sizes.discovery)
    attacks, safe = (
        count(Split.VALIDATION, sizes.validation, *ATTACKS),
        count(Split.VALIDATION, sizes.validation, *SAFE),
    )
    causal = count(Split.VALIDATION, sizes.causal_prompts, *ATTACKS)
    test = sum(len(suite.prompts) for suite in data.suites(Split.TEST, sizes.answering.per_suite))
    benign = count(Split.CALIBRATION, sizes.calibration, PromptRole.BENIGN)
    arms = 2
    if request.sweep and not request.published:
        tried = sizes.finalists * sum(len(VALIDATION_MULTIPLES[scope]) for scope in SCOPES)
        yield Stage("find features", read + 40 * causal, 48)
        yield Stage("choose on validation prompts", 0, (tried + 1) * attacks)
        yield Stage("gate and controls", read + benign + 16 * 40, 0)
        arms += max(map(len, TEST_MULTIPLES.values())) + len(OTHER_MULTIPLES) + 4
    if request.compared:
        shown = sum(METHOD_ARMS[name] for name in request.compared)
        searched = sum(READ_PER_METHOD[name] for name in request.compared)
        relapses = 16 * count(Split.DISCOVERY, 6 * sizes.discovery, *ATTACKS) if "gated-set" in request.compared else 0
        yield Stage("the methods' searches", searched * causal + 7 * read, relapses)
        yield Stage("choose methods on validation prompts", 0, (shown + 1) * (attacks + safe))
        kept = [name for name in request.compared if request.matching.wants(METHODS[name].name)]
        texts = request.matching.texts
        yield Stage("match at equal KL", (len(kept) + sizes.n_random) * MATCHING_STEPS * texts, texts)
        arms += len(request.compared) + len(kept) + 3
    few = sizes.answering.control_prompts or sizes.answering.per_suite
    suites = data.suites(Split.TEST, few)
    controls = (sizes.n_random if request.compared else 0) * sum(len(suite.prompts) for suite in suites)
    read = (arms + sizes.n_random) * min(test, sizes.answering.kl_prompts)
    yield Stage("test", read, arms * test + controls)


def measured_speed(study: Study, request: StudyRequest) -> Speed:
    """Time a few prompts. Replies are timed at their full length: the bound holds for models that never end."""
    shown = [*study.prompts(Split.VALIDATION, SAMPLE, *ATTACKS)[: SAMPLE // 2],
             *study.prompts(Split.VALIDATION, SAMPLE, *SAFE)[: SAMPLE // 2]]  # fmt: skip
    ids = [encode(study.lm, prompt.messages) for prompt in shown]
    generate(study.lm, ids[:1], max_new_tokens=1)
    began = time.perf_counter()
    generate(study.lm, ids, max_new_tokens=1)
    read = time.perf_counter() - began
    began = time.perf_counter()
    generate(study.lm, ids, max_new_tokens=request.sizes.answering.max_new_tokens)
    return Speed(read / len(ids), (time.perf_counter() - began) / len(ids))


def fitted(study: Study, request: StudyRequest, speed: Speed, minutes: float) -> StudyRequest:
    """The request at the largest size that takes at most so many minutes; the smallest when none does."""
    found = request
    for step in range(STEPS):
        found = replace(request, sizes=request.sizes.scaled(0.9**step))
        if outline(study, found, speed).seconds <= 60 * minutes:
            break
    return found
