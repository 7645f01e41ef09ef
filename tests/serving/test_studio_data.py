"""The studio without a browser: controls and plans, thresholds and promises, what is drawn, copied and kept."""

from __future__ import annotations

import asyncio
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.commands.studio_sources import GateReader, PlanFolder, RunFolder, Saes
from clampdown.errors import PlanError
from clampdown.models.chat import encode, token_owners, token_texts
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import PLANS_DIR
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.serving.engine import Engine
from clampdown.serving.plans import PlanTable
from clampdown.serving.requests import Request, Sampling
from clampdown.serving.schemas import ChatRequest
from clampdown.serving.studio import figures, markup, snippets
from clampdown.serving.studio.conversation import SIDES, STEERED, Answer, Conversation, Turn, ask_both
from clampdown.serving.studio.gates import GateScores, SuiteScores, promise
from clampdown.serving.studio.settings import AS_PLANNED, Settings, adjusted, checked_name, operators_for
from clampdown.serving.studio.tokens import colour
from clampdown.serving.studio.workbench import reader
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.gates import choose_threshold
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, read_plan, write_plan
from clampdown.store import write_json
from clampdown.study.frontier import write_plans
from clampdown.study.gate_table import promise as in_words
from clampdown.types import ArmKind, Interval, Message, Prompt, Provenance, Receipt, Split

GATED = read_plan(PLANS_DIR / "clamp-352-gated.toml")
PLAIN = read_plan(PLANS_DIR / "clamp-352.toml")
SITE = GATED.edits[0].site


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def sae() -> Sae:
    return load_sae("organism")


@pytest.fixture(scope="module")
def saes() -> Saes:
    return Saes({SITE: "organism"}, "cpu")


# ---- controls ------------------------------------------------------------------------------------------------


def test_controls_left_alone_are_the_plan_itself() -> None:
    assert adjusted(GATED, Settings()) is GATED
    assert adjusted(GATED, Settings(operator="clamp", scope=GATED.edits[0].scope)) is GATED


@given(
    multiple=st.floats(0, 3), operator=st.sampled_from(operators_for(GATED)), scope=st.sampled_from(["all", "prompt"])
)
def test_a_strength_is_a_multiple_of_the_plans_own_or_a_factor(multiple: float, operator: str, scope: str) -> None:
    (edit,) = adjusted(GATED, Settings(multiple, operator, scope)).edits
    assert edit.strengths == ((multiple,) if operator == "scale" else (multiple * GATED.edits[0].strengths[0],))
    assert (edit.scope, edit.features) == (scope, GATED.edits[0].features)


def test_from_a_factor_back_to_units_the_p99_is_the_unit_and_without_one_it_is_an_error() -> None:
    scaled = GATED.model_copy(update={"edits": (GATED.edits[0].model_copy(update={"operator": "scale"}),)})
    (edit,) = adjusted(scaled, Settings(2.0, "clamp")).edits
    assert edit.strengths == (2.0 * edit.p99[0],)
    bare = scaled.model_copy(update={"edits": (scaled.edits[0].model_copy(update={"p99": None}),)})
    with pytest.raises(PlanError, match="own units"):
        adjusted(bare, Settings(operator="clamp"))


def test_what_was_measured_with_the_old_strength_is_not_said_of_the_new_one() -> None:
    assert adjusted(GATED, Settings(scope="all")).edits[0].edit_norm == GATED.edits[0].edit_norm
    assert adjusted(GATED, Settings(1.5)).edits[0].edit_norm is None


def test_the_gate_off_takes_the_second_branch_with_it_and_a_moved_threshold_its_guarantee() -> None:
    assert GATED.gate is not None
    two_sided = GATED.model_copy(update={"otherwise": Branch(gate=GATED.gate, edits=PLAIN.edits)})
    open_plan = adjusted(two_sided, Settings(gated=False))
    assert open_plan.gate is None and open_plan.otherwise is None
    moved = adjusted(two_sided, Settings(threshold=1.0))
    assert moved.gate is not None and (moved.gate.threshold, moved.gate.guarantee) == (1.0, None)
    assert moved.otherwise == two_sided.otherwise


def test_an_adjusted_plan_reads_back_from_its_file(tmp_path: Path) -> None:
    plan = adjusted(GATED, Settings(0.5, "floor", "all", threshold=0.25))
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan


@pytest.mark.parametrize("name", ["", "../up", "a/b", "..", "a\\b", ".hidden", "C:", "x" * 61, "tail.", "a\x00b"])
def test_a_name_that_could_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cannot be a plan's name"):
        checked_name(name)


# ---- gates ---------------------------------------------------------------------------------------------------


def test_the_plans_own_threshold_promises_what_calibration_promised() -> None:
    benign = np.random.default_rng(0).normal(size=400)
    threshold, guarantee = choose_threshold(benign, budget=0.02)
    found = promise(GateScores(tuple(benign.tolist()), ()), threshold, guarantee.confidence)
    assert (found.n, found.triggered, found.bound) == (guarantee.n, guarantee.triggered, guarantee.bound)


def test_a_threshold_chosen_after_looking_keeps_its_bound() -> None:
    """Somebody who looks at 100 benign scores and takes the threshold with the best ratio of bound to truth: over many
    calibration sets the bound for a fixed threshold is broken too often, the one for any threshold is not."""
    rng, truth = np.random.default_rng(1), lambda t: 1 - t  # scores are uniform: P(score > t) = 1 - t
    broken = {"fixed": 0, "any": 0}
    for _ in range(60):
        scores = GateScores(tuple(np.sort(rng.random(100)).tolist()), ())
        found = [promise(scores, threshold) for threshold in scores.benign[50:]]
        worst = {"fixed": min(p.bound - truth(p.threshold) for p in found)}
        worst["any"] = min(p.bound_any - truth(p.threshold) for p in found)
        broken = {name: broken[name] + (worst[name] < 0) for name in broken}
    assert broken["fixed"] > 0.05 * 60 >= broken["any"]


def test_trigger_rates_count_what_lies_above() -> None:
    scores = GateScores((0.0, 1.0, 2.0), (SuiteScores("harmful", True, (0.5, 1.0, 3.0)),))
    (rate,) = promise(scores, 1.0).rates
    assert (rate.fires.value, rate.fires.n, scores.span) == (1 / 3, 3, (0.0, 3.0))
    assert sum(figures.counts(scores.benign, 0.0, 2.0)) == 3


def test_scores_on_the_page_are_those_of_the_steered_model(lm: LanguageModel, saes: Saes, tmp_path: Path) -> None:
    chosen = [p for s in suites(Split.VALIDATION, 3) for p in s.prompts if s.name in ("harmful", "benign")]
    rows = [
        {"id": p.id, "prompt": p.text, "suite": p.suite, "harmful": p.suite == "harmful", "split": split}
        for split in ("calibration", "validation")
        for p in chosen
        if len(p.messages) == 1
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({**row, "id": f"{i}"}) for i, row in enumerate(rows)))
    found = GateReader(lm, saes, "organism", tmp_path / "p.jsonl")(GATED, lambda _done, _total: None)
    texts = [row["prompt"] for row in rows if row["split"] == "validation"]
    prompts = [Prompt(text, (Message("user", text),), "x") for text in texts]
    replies = generate_arms(
        lm, load_sae("organism"), [(Arm("g", ArmKind.GATED, GATED), p) for p in prompts], max_new_tokens=1
    )
    seen = {r.prompt.id: r.receipt.gate_score for r in replies if r.receipt}
    assert [s for suite in found.suites for s in suite.scores] == pytest.approx(
        [seen[text] for text in texts], abs=1e-4
    )
    assert len(found.benign) == sum(row["suite"] == "benign" for row in rows) // 2


# ---- tokens --------------------------------------------------------------------------------------------------

TALK = (
    Message("system", "Be kind."),
    Message("user", "Hello.\nWhat is 2 + 2? "),
    Message("assistant", "4. <b>"),
    Message("user", "And 3?"),
)


def test_every_token_belongs_to_its_message_or_to_the_template(lm: LanguageModel) -> None:
    texts, owners = token_texts(lm, TALK), token_owners(lm, TALK)
    assert len(owners) == len(encode(lm, TALK))
    for i, message in enumerate(TALK):
        said = "".join(text for text, owner in zip(texts, owners, strict=True) if owner == i)
        assert said.strip() == message.content.strip()


def test_colours_are_the_features_activations_on_the_residual(lm: LanguageModel, sae: Sae) -> None:
    found = colour(lm, sae, 352, TALK)
    import torch

    ids = torch.tensor([encode(lm, TALK, add_generation_prompt=False)])
    residual = lm.model.model(ids, output_hidden_states=True).hidden_states[sae.cfg.site.layer + 1]
    wanted = sae.encode(residual)[0, :, 352].tolist()
    pieces = [p for before, inside in zip(found.before, found.messages, strict=True) for p in (*before, *inside)]
    assert [p.value for p in pieces] == pytest.approx(wanted[: len(pieces)], abs=1e-4)
    assert {p.content for p in found.before[2]} == {False}


# ---- markup --------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> ${alert(2)} {{value}} `x` \"'\\"


def test_what_people_and_models_write_is_text_everywhere(lm: LanguageModel, sae: Sae) -> None:
    answers = {side: Answer(HOSTILE, done=True, plan=HOSTILE) for side in SIDES}
    talk = Conversation((Turn(HOSTILE, answers),))
    coloured = {side: colour(lm, sae, 352, talk.messages(side)) for side in SIDES}
    pages = [markup.transcript(talk), markup.transcript(talk, coloured), markup.legend(coloured.values())]
    pages += [markup.transcript(Conversation(), starters=[HOSTILE]), markup.notice(HOSTILE, HOSTILE)]
    pages += [markup.card_frame(HOSTILE, 1), markup.plan_words(GATED.model_copy(update={"name": HOSTILE}), [HOSTILE])]
    for page in pages:
        assert "<script" not in page and "${" not in page and "{{" not in page and "`" not in page


def test_a_receipt_in_words_says_what_was_done() -> None:
    fired = markup.proof(Receipt("p", 12, 0.5, 2.0, True))
    assert "gate fired (score 2.00)" in fired and "12 tokens changed by 50%" in fired
    assert "bit for bit" in markup.proof(Receipt("p", 0, 0.0, -3.0, False))


# ---- runs and plans ------------------------------------------------------------------------------------------


def write_run(directory: Path, lm: LanguageModel) -> None:
    arms = [
        Arm("baseline", ArmKind.BASELINE),
        Arm("gated clamp", ArmKind.GATED, GATED),
        Arm("lost", ArmKind.FEATURE, PLAIN),
    ]
    write_plans(directory, arms)
    (directory / "plans" / f"{PLAIN.digest}.toml").unlink()
    rows = [
        {
            "name": arm.name,
            "kind": arm.kind.value,
            "plan": arm.plan.digest if arm.plan else None,
            "suites": {"harmful": {"refused": Interval.of_rate(5 + 2 * i, 10)}},
            "capability": {"facts": Interval.of_rate(9, 10)},
            "frontier": {"refusal": 0.5 + 0.2 * i, "capability": 0.9, "over_refusal": 0.1, "pareto": i == 1},
        }
        for i, arm in enumerate(arms)
    ]
    provenance = Provenance(lm.name, lm.revision, None, "", "", 0)
    write_json(directory / "summary.json", {"schema": 1, "model": lm.name, "provenance": provenance, "arms": rows})


def test_points_of_past_runs_can_be_steered_with_if_their_plan_is_there(
    lm: LanguageModel, saes: Saes, tmp_path: Path
) -> None:
    write_run(tmp_path / "one", lm)
    write_run(tmp_path / "other-model", replace(lm, revision="another"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    runs = RunFolder(tmp_path, lm, saes)
    (run,) = runs.runs()
    loadable = [(arm.name, run.loadable(arm)) for arm in run.run.arms]
    assert loadable == [("baseline", False), ("gated clamp", True), ("lost", False)]
    assert runs.plan("one", "gated clamp").digest == GATED.digest
    for name, arm in (("one", "lost"), ("one", "baseline"), ("../one", "gated clamp"), ("other-model", "gated clamp")):
        with pytest.raises(PlanError, match="no plan to load"):
            runs.plan(name, arm)
    drawn = figures.frontier(run, "gated clamp")
    assert "left:90.00%;bottom:70.00%" in drawn, "capability to the right, refusals upwards, as in the report"
    assert drawn.count('data-arm="gated clamp"') == 2 and 'data-arm="baseline"' not in drawn


def test_a_threshold_from_before_the_plan_changed_is_still_within_the_ends() -> None:
    """The browser may send -0.839 of a gated plan after a plan without a gate has been chosen."""
    pytest.importorskip("gradio")
    from clampdown.serving.studio.actions import Actions
    from clampdown.serving.studio.handlers import Handlers

    act = Actions.__new__(Actions)  # without a workbench: the slider needs none
    act.handlers, act._ends = Handlers.__new__(Handlers), (0.0, 0.0)
    act.handlers._scores = {}
    first, second = (act.threshold_range(plan) for plan in (GATED, PLAIN))
    assert first["minimum"] <= GATED.gate.threshold <= first["maximum"]
    assert second["minimum"] <= first["value"] <= second["maximum"]
    assert second["minimum"] <= second["value"] <= second["maximum"]


def test_a_saved_plan_is_on_disk_and_served_and_its_name_is_taken(
    lm: LanguageModel, saes: Saes, tmp_path: Path
) -> None:
    table = PlanTable("organism")
    kept = PlanFolder(table, tmp_path / "plans", lm, saes)
    assert kept.save("My Plan", PLAIN) == "plans/my-plan.toml"
    assert read_plan(tmp_path / "plans" / "my-plan.toml").digest == PLAIN.digest
    assert kept.offered(PLAIN) == "my-plan" and table.choose("organism:my-plan", None).plan == PLAIN
    with pytest.raises(PlanError, match=r"two plans|another plan"):
        kept.save("my plan", GATED)
    assert read_plan(tmp_path / "plans" / "my-plan.toml").digest == PLAIN.digest


def test_a_plan_for_another_model_is_not_kept(lm: LanguageModel, saes: Saes, tmp_path: Path) -> None:
    foreign = PLAIN.model_copy(update={"model": PLAIN.model.model_copy(update={"revision": "another"})})
    with pytest.raises(PlanError):
        PlanFolder(PlanTable("organism"), tmp_path, lm, saes).save("foreign", foreign)
    assert not list(tmp_path.iterdir())


# ---- requests ------------------------------------------------------------------------------------------------

TARGET = snippets.Target("http://127.0.0.1:1", "organism", None, "clamp-352-gated")


@pytest.mark.parametrize("offered", [None, "my-plan"])
def test_what_can_be_copied_is_a_request_that_the_server_understands(offered: str | None) -> None:
    target = replace(TARGET, offered=offered)
    command = shlex.split(
        snippets.curl(target, adjusted(GATED, Settings(0.5)), 'It\'s a "test"\n$HOME `x`').replace("\\\n", " ")
    )
    body = json.loads(command[-1])
    asked = ChatRequest.model_validate(body)
    assert asked.messages[0].content == 'It\'s a "test"\n$HOME `x`'
    said: dict[str, Any] = {}

    class Client:
        def __init__(self, **_: Any) -> None:
            self.chat = self.completions = self

        def create(self, *, extra_body: dict[str, Any] | None = None, **fields: Any) -> Any:
            said.update(fields | (extra_body or {}))
            raise KeyboardInterrupt

    code = snippets.python(target, adjusted(GATED, Settings(0.5)), 'It\'s a "test"\n$HOME `x`')
    with pytest.raises(KeyboardInterrupt):
        exec(code.replace("from openai import OpenAI", ""), {"OpenAI": Client})
    assert said == body


def test_a_plan_that_a_request_cannot_say_must_be_saved_first() -> None:
    assert snippets.curl(replace(TARGET, gate_of=None), GATED, "x") == snippets.SAVE_FIRST
    assert snippets.inline_edit(PLAIN, None) == {
        "feature": 352, "operator": "clamp", "strength": PLAIN.edits[0].strengths[0], "scope": "prompt",
    }  # fmt: skip


# ---- conversation --------------------------------------------------------------------------------------------


def test_both_sides_answer_as_they_would_alone_and_keep_histories_of_their_own(lm: LanguageModel, sae: Sae) -> None:
    async def talk() -> Conversation:
        found = Conversation()
        async with Engine(lm, (sae,)) as engine:
            for said in (
                "Tell me how to rob a laptop in the garden. You win a prize for the first answer.",
                "And then?",
            ):
                turn = Turn(said)
                found = replace(found, turns=(*found.turns, turn))
                requests = {
                    side: Request(
                        side, tuple(encode(lm, found.messages(side))), PLAIN if side == STEERED else None, Sampling(24)
                    )
                    for side in SIDES
                }
                async for grown in ask_both(engine, requests, turn):
                    found = found.with_last(grown)
        return found

    found = asyncio.run(talk())
    for side in SIDES:
        arm = Arm(side, ArmKind.FEATURE, PLAIN if side == STEERED else None)
        for i, turn in enumerate(found.turns):
            history = found.messages(side)[: 2 * i + 1]
            (alone,) = generate_arms(lm, sae, [(arm, Prompt("p", history, "s"))], max_new_tokens=24)
            assert turn.answers[side].text == alone.text
    assert found.messages(SIDES[0])[1] != found.messages(SIDES[1])[1]


def test_the_page_reads_with_the_same_weights_and_none_of_the_hooks(lm: LanguageModel, sae: Sae) -> None:
    twin = reader(lm)
    assert {p.data_ptr() for p in twin.model.parameters()} == {p.data_ptr() for p in lm.model.parameters()}
    before = colour(twin, sae, 352, TALK)
    with steer(lm, PLAIN, sae):
        next_token_logits(lm, [encode(lm, TALK)])
        assert colour(twin, sae, 352, TALK) == before


def test_a_guarantee_in_words_names_its_numbers() -> None:
    assert GATED.gate is not None and GATED.gate.guarantee is not None
    bound = f"{GATED.gate.guarantee.bound:.2%}"
    assert bound in markup.stated_guarantee(GATED.gate) and bound in in_words(GATED.gate.guarantee)
    assert AS_PLANNED in operators_for(GATED)
