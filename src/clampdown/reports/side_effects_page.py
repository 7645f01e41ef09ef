"""What else moved as one HTML file that opens offline. It holds numbers and first words of replies, and no reply."""

from __future__ import annotations

from pathlib import Path

from clampdown.reports.page import asset, emphasised, environment
from clampdown.reports.side_effects_terminal import difference, legend, number, p_value
from clampdown.reports.tables import Cell, Column, Row, Table, facts
from clampdown.reports.wording import full
from clampdown.results.side_effects import Effect, Mark, SideEffects, Steered
from clampdown.store import write_atomic

PAGE = "side-effects.html"
COLUMNS = (
    Column("about", kind="text"), Column("measure", kind="text"), Column("n"), Column("baseline"), Column("steered"),
    Column("difference", "95 %"), Column("p", "Holm"), Column("", kind="text"),
)  # fmt: skip


def write_side_effects_page(path: Path, found: SideEffects) -> None:
    write_atomic(path, build_side_effects_page(found))


def build_side_effects_page(found: SideEffects) -> str:
    """The whole page as one HTML document."""
    about = {"model": found.model, "revision": found.revision, "judge": found.judge, "seed": found.seed,
             "margin": found.margin, "code": found.code, "prompts": found.prompts_hash}  # fmt: skip
    return environment().get_template("side_effects.html.j2").render(
        found=found,
        page_style=asset("report.css"),
        style=asset("explain.css"),
        sentences=[emphasised(_sentence(found, arm)) for arm in found.arms],
        tables=[(arm.name, effects_table(found, arm.name, i)) for i, arm in enumerate(found.arms)],
        missing=missing_table(found),
        words=words_table(found),
        legend=legend(found.margin),
        provenance=facts(about),
    )  # fmt: skip


def _sentence(found: SideEffects, arm: Steered) -> str:
    fired = "" if arm.fired is None else f" Its gate fired on {full(arm.fired)} replies."
    return f"**{arm.name}**: {found.sentence(arm.name)}{fired}"


def effects_table(found: SideEffects, arm: str, place: int) -> Table:
    """One plan's measures; what moved stands out."""
    rows = tuple(Row(_cells(effect), effect.mark is Mark.MOVED) for effect in found.of(arm))
    return Table(f"effects-{place}", f"{arm} beside the unsteered model, on the same prompts.", COLUMNS, rows)


def _cells(effect: Effect) -> tuple[Cell, ...]:
    mark, note = effect.mark.value, "for the worse" if effect.worsened else ""
    return (
        Cell(effect.kind, effect.kind, effect.aspect),
        Cell(effect.measure, effect.measure),
        Cell(str(effect.difference.n), effect.difference.n),
        Cell(number(effect, effect.baseline.value), effect.baseline.value, effect.unit.value),
        Cell(number(effect, effect.steered.value), effect.steered.value),
        Cell(difference(effect), effect.difference.value),
        Cell(p_value(effect.p_holm), effect.p_holm),
        Cell(mark, mark, note),
    )


def missing_table(found: SideEffects) -> Table | None:
    """What nothing is known about."""
    if not found.not_measured:
        return None
    columns = (Column("about", kind="text"), Column("plan", kind="text"), Column("why not", kind="text"))
    rows = tuple(
        Row((Cell(row.aspect, row.aspect, row.kind), Cell(row.arm or "every plan"), Cell(row.why)))
        for row in found.not_measured
    )
    return Table("missing", "Nothing on this page says anything about these.", columns, rows)


def words_table(found: SideEffects) -> Table | None:
    """How replies to harmless prompts begin."""
    if not found.first_words:
        return None
    columns = (Column("arm", kind="text"), Column("first words of replies, and how many", kind="text"))
    rows = tuple(
        Row((Cell(arm), Cell(", ".join(f"{word or '(none)'} {count}" for word, count in words.items()))))
        for arm, words in found.first_words.items()
    )
    return Table("words", "The ten commonest.", columns, rows)
