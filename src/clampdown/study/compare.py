"""`clampdown compare A B`: two runs, or two arms, on the same prompts and judged by the same judge.

A and B are run directories, `DIR:ARM`, or (one of them) the name of an arm in the other's directory. Two directories
are compared arm by arm, by name. Runs of other prompts or another judge are refused: their difference would mean
nothing. What else differs between the runs (model, plan, reply length) is said above the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.errors import PromptSetError, StoreError
from clampdown.evaluation.comparison import ArmComparison, Flip, SuiteComparison, compare_arms, small
from clampdown.evaluation.judges.pairwise import SuitePreference, preference_endpoint, preferences
from clampdown.evaluation.suites import read_suites
from clampdown.reports.compared_page import ComparedArms, ComparedSuite, Flipped, Said, build_compared_page
from clampdown.results.directory import RunDirectory
from clampdown.store import write_atomic, write_json
from clampdown.types import Prompt, Record, SuiteKind, Verdict

LONGEST_REPLY = 160


class Recorded(RunDirectory):
    """A run directory, finished or not: its records, and the key that says what they are records of."""

    @property
    def key(self) -> Mapping[str, Any]:
        """Raises `StoreError` when the manifest does not say what was run."""
        found = self.manifest.get("key")
        if not isinstance(found, Mapping):
            raise StoreError(f"{self.path}/manifest.json does not say what was run")
        return found

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.arm for record in self.records))

    def of_arm(self, arm: str) -> tuple[Record, ...]:
        """Raises `StoreError` when the run has no such arm, or its records cannot be read."""
        found = tuple(record for record in self.records if record.arm == arm)
        if not found:
            hint = self.notes.get("records.jsonl") or f"arms: {', '.join(map(repr, self.arms))}"
            raise StoreError(f"{self.path} has no arm '{arm}'", hint=hint)
        return found

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of each suite's prompts, by suite."""
        suites = self.key["suites"]
        return dict(suites) if isinstance(suites, Mapping) else {row["name"]: row["prompts"] for row in suites}


@dataclass(frozen=True, slots=True)
class Side:
    """What one operand names: a run, and an arm of it (None: all of them)."""

    run: Recorded
    arm: str | None


@dataclass(frozen=True, slots=True)
class ArmPreference:
    """Whose replies a language model prefers, of two arms, suite by suite."""

    first: str
    second: str
    suites: tuple[SuitePreference, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that `compare` shows."""

    arms: tuple[ArmComparison, ...]
    notes: tuple[str, ...]
    prompts: Mapping[tuple[str, str], str]
    preferences: tuple[ArmPreference, ...] = ()


def run_compare(first: str, second: str, preference: str | None = None) -> Comparison:
    """Compare two operands; with `preference` (llm:MODEL@URL) a language model says whose replies serve better.

    Raises `StoreError` for what is no run, `PromptSetError` for what cannot be compared, `JudgeError` for a bad
    preference or an endpoint that refuses.
    """
    a, b = _sides(first, second)
    suites = _comparable(a.run, b.run)
    found = tuple(
        ArmComparison(_label(a, one, b), _label(b, other, a), compare_arms(_only(a.run.of_arm(one), suites),
                                                                           _only(b.run.of_arm(other), suites)))
        for one, other in _arm_pairs(a, b)
    )  # fmt: skip
    preferred = _preferences(a, b, suites, preference) if preference else ()
    return Comparison(found, _notes(a.run, b.run, suites), _texts(a.run.path), preferred)


def _preferences(a: Side, b: Side, suites: Sequence[str], spec: str) -> tuple[ArmPreference, ...]:
    """On harmless prompts alone: who asks for harm is not served better by getting it."""
    endpoint = preference_endpoint(spec, _models(a, b))
    prompts = harmless_prompts(a.run.path)
    asked = [suite for suite in suites if any(name == suite for name, _ in prompts)]
    return tuple(
        ArmPreference(
            _label(a, one, b),
            _label(b, other, a),
            preferences(endpoint, _only(a.run.of_arm(one), asked), _only(b.run.of_arm(other), asked), prompts),
        )
        for one, other in _arm_pairs(a, b)
    )


def harmless_prompts(directory: Path) -> dict[tuple[str, str], Prompt]:
    """The prompts of a run's harmless suites without right answers, by suite and id."""
    path = directory / "prompts.jsonl"
    if not path.is_file():
        raise PromptSetError(
            f"{directory} has no prompts.jsonl", hint="replies cannot be compared without their prompts"
        )
    return {
        (suite.name, prompt.id): prompt
        for suite in read_suites(path)
        if suite.kind is SuiteKind.SAFETY and not suite.harmful
        for prompt in suite.prompts
    }


def _models(a: Side, b: Side) -> list[str]:
    """All names of the models whose replies are compared: neither may be the one that compares."""
    keys = [side.run.key.get("model", {}) for side in (a, b)]
    return [str(key[name]) for key in keys if isinstance(key, Mapping) for name in ("name", "revision") if name in key]


def _sides(first: str, second: str) -> tuple[Side, Side]:
    """Both operands; a bare arm's name belongs to the other's directory."""
    found = [_side(operand) for operand in (first, second)]
    known = next((side for side in found if side), None)
    if known is None:
        raise StoreError(f"neither '{first}' nor '{second}' is a run directory", hint="DIR, DIR:ARM, or an arm's name")
    a, b = (side or Side(known.run, operand) for side, operand in zip(found, (first, second), strict=True))
    return a, b


def _side(operand: str) -> Side | None:
    if Path(operand).is_dir():
        return Side(_read(Path(operand)), None)
    directory, colon, arm = operand.partition(":")
    while colon and not Path(directory).is_dir():
        more, colon, arm = arm.partition(":")
        directory = f"{directory}:{more}"
    return Side(_read(Path(directory)), arm) if colon else None


def _read(directory: Path) -> Recorded:
    found = Recorded(directory)
    if not found.key or not found.records:
        raise StoreError(f"{directory} holds no records to compare", hint=found.notes.get("records.jsonl"))
    return found


def _comparable(a: Recorded, b: Recorded) -> tuple[str, ...]:
    """The suites of both runs, in the first one's order.

    Raises `PromptSetError` when there is none, when one has other prompts, or when the judges differ.
    """
    if a.key.get("judge") != b.key.get("judge"):
        raise PromptSetError(
            f"the runs were judged by different judges: {a.key.get('judge')} and {b.key.get('judge')}",
            hint="a difference between judges is no difference between arms; judge both alike",
        )
    common = tuple(name for name in a.hashes if name in b.hashes)
    other = sorted(name for name in common if a.hashes[name] != b.hashes[name])
    if other:
        raise PromptSetError(
            f"the runs asked different prompts in {', '.join(other)}",
            hint="use the same --suites, --split, --limit and --seed for both",
        )
    if not common:
        raise PromptSetError("the runs have no suite in common")
    return common


def _arm_pairs(a: Side, b: Side) -> list[tuple[str, str]]:
    """Arms to compare: those named, else those of the same name, else the only steered one of each run."""
    if a.arm and b.arm:
        return [(a.arm, b.arm)]
    if a.arm or b.arm:
        name = a.arm or b.arm or ""
        return [(name, name)]
    if a.run.path == b.run.path:
        raise PromptSetError("that is the same run twice", hint="name two of its arms: DIR:ARM and an arm's name")
    common = [(arm, arm) for arm in a.run.arms if arm in b.run.arms]
    if not common:
        raise PromptSetError("the runs have no arm in common", hint="name the arms: DIR:ARM")
    return common


def _only(records: Sequence[Record], suites: Sequence[str]) -> list[Record]:
    """Records of these suites, in the suites' order."""
    return [record for suite in suites for record in records if record.suite == suite]


def _label(side: Side, arm: str, other: Side) -> str:
    return arm if side.run.path == other.run.path else f"{side.run.path.name}:{arm}"


def _notes(a: Recorded, b: Recorded, suites: Sequence[str]) -> tuple[str, ...]:
    notes = [f"{name} differs between the runs" for name in ("code", "model", "saes", "generation")
             if a.key.get(name) != b.key.get(name)]  # fmt: skip
    left_out = sorted({*a.hashes, *b.hashes} - {*suites})
    return (*notes, *([f"suites of one run only, left out: {', '.join(left_out)}"] if left_out else []))


def _texts(directory: Path) -> dict[tuple[str, str], str]:
    """The last user turn of each prompt, for the examples; none without `prompts.jsonl`."""
    path = directory / "prompts.jsonl"
    if not path.is_file():
        return {}
    return {(suite.name, prompt.id): prompt.text for suite in read_suites(path) for prompt in suite.prompts}


def shown(found: Comparison, examples: int) -> RenderableType:
    """Notes, a table for each pair of arms, and the prompts that flipped."""
    parts: list[RenderableType] = [Text(f"note: {note}", style="yellow") for note in found.notes]
    for arms in found.arms:
        parts.append(Padding(_table(arms), (1, 0, 0, 0)))
        parts += [_example(row, found.prompts, examples) for row in arms.suites if row.flips and examples]
    parts += [Padding(_preferred(row), (1, 0, 0, 0)) for row in found.preferences]
    return Group(*parts)


def _table(arms: ArmComparison) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left")
    table.title = escape(f"{arms.first}  →  {arms.second}")
    table.add_column("suite", no_wrap=True, overflow="ellipsis")
    for heading in ("outcome", "n", "before", "after", "difference [95%]", "+", "\N{MINUS SIGN}", "p", "q"):
        table.add_column(heading, justify="left" if heading == "outcome" else "right", no_wrap=True)
    for row in arms.suites:
        change = row.change
        table.add_row(escape(row.suite), row.outcome, str(change.difference.n), f"{row.before:.2f}", f"{row.after:.2f}",
                      change.difference.signed, str(change.gained), str(change.lost),
                      small(change.p_value), small(row.q_value))  # fmt: skip
    table.caption = "+ and \N{MINUS SIGN}: prompts gained and lost; p: exact McNemar; q: Benjamini-Hochberg over suites"
    return table


def _preferred(arms: ArmPreference) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left")
    table.title = escape(f"preferred: {arms.second} over {arms.first}")
    table.add_column("suite", no_wrap=True, overflow="ellipsis")
    for heading in ("n", "win rate", "at equal length", "words longer", "by place", "unscored"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in arms.suites:
        won = row.won
        table.add_row(escape(row.suite), str(won.n), f"{won.raw:.2f}", f"{won.length_controlled:.2f}",
                      f"{won.longer:+.1f}", str(won.order), str(won.unscored))  # fmt: skip
    table.caption = "each pair is asked in both orders; 'by place': the answer followed the order, a tie"
    return table


def _example(row: SuiteComparison, prompts: Mapping[tuple[str, str], str], most: int) -> RenderableType:
    lines: list[RenderableType] = [Text(f"{row.suite}: {len(row.flips)} flipped", style="bold")]
    for flip in row.flips[:most]:
        text = prompts.get((row.suite, flip.before.prompt_id), flip.before.prompt_id)
        lines.append(Text(f"  {_cut(text)}"))
        lines += [Text(f"    {record.verdict.value}: {_cut(record.reply)}", style="dim")
                  for record in (flip.before, flip.after)]  # fmt: skip
    return Group(*lines)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REPLY else line[:LONGEST_REPLY] + "…"


def write_page(path: Path, found: Comparison) -> None:
    """Both arms side by side, every flip to be read."""
    arms = [ComparedArms(each.first, each.second, _compared(each, found.prompts)) for each in found.arms]
    write_atomic(path, build_compared_page(arms, found.notes))


def _compared(arms: ArmComparison, prompts: Mapping[tuple[str, str], str]) -> tuple[ComparedSuite, ...]:
    return tuple(
        ComparedSuite(
            row.suite,
            row.outcome,
            row.before,
            row.after,
            row.change.difference,
            small(row.change.p_value),
            tuple(_flipped(row, flip, prompts) for flip in row.flips),
        )
        for row in arms.suites
    )


def _flipped(row: SuiteComparison, flip: Flip, prompts: Mapping[tuple[str, str], str]) -> Flipped:
    first, second = (Said(each.reply, each.verdict, each.correct) for each in (flip.before, flip.after))
    gained = bool(second.correct) if row.outcome == "correct" else second.verdict is Verdict.REFUSED
    prompt = prompts.get((row.suite, flip.before.prompt_id), flip.before.prompt_id)
    return Flipped(prompt, gained, first, second)


def write_comparison(path: Path, found: Comparison) -> None:
    """Everything as JSON: differences are second minus first."""
    write_json(
        path,
        {"schema": 1, "kind": "comparison", "notes": found.notes, "arms": found.arms}
        | ({"preferences": found.preferences} if found.preferences else {}),
    )
