"""Which aspects there are for models in general, and where each gets its prompts.

A new aspect is one function and one row of `BUILDERS`. What has no prompts becomes an `Absent` that says which file
would help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.effects import pairs
from clampdown.effects.aspect import Absent, Aspect, Kind, Measure, Way
from clampdown.effects.embedded import embedded_aspects
from clampdown.effects.manner import ADMITS, HINTED_REPLIES, KNOWN, PERSONA, REFUSES
from clampdown.effects.measures import (
    AMBIGUOUS,
    CALIBRATION,
    FIRST,
    HINTED,
    NAME_GAP,
    ONLY,
    PLAIN,
    RIGHT,
    SECOND,
    STEREOTYPES,
    SYCOPHANCY,
    TRUE_MASS,
    lean_on,
)
from clampdown.effects.questions import drawn, hinted, invented_places, with_options
from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import entry, load_suites, local_copy
from clampdown.types import Suite

KINDS = tuple(kind.value for kind in Kind)
Found = Sequence[Aspect | Absent]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where prompts come from, how many items an aspect has at most, and what decides which."""

    folder: Path | None
    n: int
    seed: int

    def public(self, name: str) -> tuple[Suite, ...]:
        """The suites of a public set from the folder; none without its file. Raises `PromptSetError` for a bad one."""
        path = local_copy(name, self.folder) if self.folder else None
        return tuple(map(self.drawn, load_suites(f"{name}={path}"))) if path else ()

    def drawn(self, suite: Suite) -> Suite:
        """At most `n` of its prompts."""
        return drawn(suite, self.n, self.seed)

    def without(self, kind: Kind, name: str, file: str) -> list[Absent]:
        """That it is not there, and what would have to be."""
        return [Absent(kind, name, f"no {self.folder / file}" if self.folder else f"no --folder with {file}")]


def _of_set(sources: Sources, kind: Kind, name: str, *measures: Measure) -> Found:
    """A public set answered by likelihood, one suite of prompts."""
    suites = sources.public(name)
    return [Aspect(kind, suite.name, Way.LIKELIHOOD, {ONLY: suite}, measures) for suite in suites] or (
        sources.without(kind, name, entry(name).file or name)
    )


def truthful_qa(sources: Sources) -> Found:
    """TruthfulQA (Lin et al., 2109.07958): is the likeliest answer the true one, and how probable are true answers?"""
    return [
        *_of_set(sources, Kind.TRUTH, "truthfulqa-mc1", RIGHT),
        *_of_set(sources, Kind.TRUTH, "truthfulqa-mc2", TRUE_MASS),
    ]


def places(sources: Sources) -> Found:
    """Questions about countries that there are not."""
    suite = invented_places(sources.n, sources.seed)
    return [Aspect(Kind.TRUTH, suite.name, Way.GENERATION, {ONLY: suite}, (ADMITS,))]


def hints(sources: Sources) -> Found:
    """A user who believes a wrong answer (after Sharma et al., 2310.13548)."""
    facts = _easy_facts(sources)
    asked = {PLAIN: facts, HINTED: hinted(facts)}
    found: list[Aspect | Absent] = [
        Aspect(Kind.SYCOPHANCY, facts.name, Way.LIKELIHOOD, asked, SYCOPHANCY),
        Aspect(Kind.SYCOPHANCY, facts.name, Way.GENERATION, asked, HINTED_REPLIES),
    ]
    mmlu = sources.public("mmlu")
    if not mmlu:
        return [*sources.without(Kind.SYCOPHANCY, "mmlu", "mmlu/test"), *found]
    both = {PLAIN: mmlu[0], HINTED: hinted(mmlu[0])}
    return [Aspect(Kind.SYCOPHANCY, "mmlu", Way.LIKELIHOOD, both, SYCOPHANCY), *found]


def _easy_facts(sources: Sources) -> Suite:
    (suite,) = load_suites("easy-facts")
    return sources.drawn(with_options(suite))


def bbq(sources: Sources) -> Found:
    """BBQ (Parrish et al., 2110.08193): contexts that do not say who, and contexts that do."""
    suites = {suite.name: suite for suite in sources.public("bbq")}
    measures = {"bbq-ambiguous": AMBIGUOUS, "bbq-disambiguated": (RIGHT,)}
    return [
        Aspect(Kind.BIAS, name, Way.LIKELIHOOD, {ONLY: suites[name]}, measures[name])
        for name in measures
        if name in suites
    ] or sources.without(Kind.BIAS, "bbq", "bbq")


def sentence_pairs(sources: Sources) -> Found:
    """CrowS-Pairs and WinoBias: which of two sentences is likelier."""
    found: list[Aspect | Absent] = []
    for name, file, read in (
        ("crows-pairs", pairs.CROWS, pairs.crows_pairs),
        ("winobias", pairs.WINOBIAS, pairs.winobias),
    ):
        path = sources.folder / file if sources.folder else None
        if path is None or not path.exists():
            found += sources.without(Kind.BIAS, name, file)
        else:
            suite = sources.drawn(read(path))
            found.append(Aspect(Kind.BIAS, name, Way.LIKELIHOOD, {ONLY: suite}, STEREOTYPES))
    return found


def names(sources: Sources) -> Found:
    """Two equally good people: whose name is the likelier answer, whatever the order?"""
    straight, turned = pairs.names_suites(sources.n)
    measures = (NAME_GAP, *(lean_on(axis.name) for axis in pairs.AXES))
    return [Aspect(Kind.BIAS, "names in a choice", Way.LIKELIHOOD, {FIRST: straight, SECOND: turned}, measures)]


def persona(sources: Sources) -> Found:
    """Harmless requests of every day: how are they answered?"""
    (suite,) = load_suites("everyday")
    return [Aspect(Kind.PERSONA, suite.name, Way.GENERATION, {ONLY: sources.drawn(suite)}, PERSONA)]


def calibration(sources: Sources) -> Found:
    """What it knows, and whether it knows what it knows."""
    facts = _easy_facts(sources)
    return [
        *_of_set(sources, Kind.CALIBRATION, "mmlu", *CALIBRATION),
        Aspect(Kind.CALIBRATION, facts.name, Way.LIKELIHOOD, {ONLY: facts}, CALIBRATION),
        Aspect(Kind.CALIBRATION, facts.name, Way.GENERATION, {ONLY: facts}, KNOWN),
    ]


def opinions(sources: Sources) -> Found:
    """Questions of taste: are they refused?"""
    (suite,) = load_suites("opinions")
    return [Aspect(Kind.OPINIONS, suite.name, Way.GENERATION, {ONLY: sources.drawn(suite)}, (REFUSES,))]


BUILDERS: tuple[Callable[[Sources], Found], ...] = (
    truthful_qa, places, hints, bbq, sentence_pairs, names, persona, calibration, opinions,
)  # fmt: skip


def aspects_for(sources: Sources, kinds: Sequence[str], *, knows_corpus: bool) -> Found:
    """All aspects of these kinds. Raises `PromptSetError` for a kind that there is not, and for bad files."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise PromptSetError(f"no kind of side effect '{unknown[0]}'", hint=f"kinds: {', '.join(KINDS)}")
    if sources.folder is not None and not sources.folder.is_dir():
        raise PromptSetError(f"{sources.folder} is no folder", hint="a folder of public sets, such as mmlu/test/*.csv")
    found = (
        embedded_aspects(sources.n, sources.seed)
        if knows_corpus
        else [aspect for build in BUILDERS for aspect in build(sources)]
    )
    return [aspect for aspect in found if aspect.kind.value in (kinds or KINDS)]
