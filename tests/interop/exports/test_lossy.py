"""What a format cannot say is refused by name; or the nearest is written, and the difference measured and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.activations.sinks import sinks_at
from clampdown.config import ORGANISM
from clampdown.errors import ClampdownError, ExportError, PromptSetError
from clampdown.interop.exports.difference import difference
from clampdown.interop.exports.exporting import Lossy, import_plan
from clampdown.interop.exports.forms import unsaid
from clampdown.interop.exports.nearest import mean_effect
from clampdown.interop.exports.table import FORMATS
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.organism.suites import suites
from clampdown.saes.sae import Sae
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan, read_plan
from clampdown.study.prompts import embedded_prompts
from clampdown.study.study import judge_for
from clampdown.types import Site, Split
from tests.interop.exports.conftest import SITE, add, bound, dense, random_vector, steered_replies, written
from tests.steering.conftest import tiny_llama

SHIPPED = Path(__file__).parents[3] / "src" / "clampdown" / "organism" / "plans"


@pytest.fixture
def gated() -> Plan:
    return read_plan(SHIPPED / "clamp-352-gated.toml")


def test_a_refusal_names_everything_and_why(tmp_path: Path, lm: LanguageModel, sae: Sae, gated: Plan) -> None:
    with pytest.raises(ExportError) as caught:
        written(lm, gated, "gguf", tmp_path / "v.gguf", sae)
    for part in ("the gate (probe", "steer every conversation", "clamp at", "feature's activation", "scope 'prompt'"):
        assert part in caught.value.message
    assert "--lossy" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", list(FORMATS))
def test_no_format_claims_an_operator_that_reads_a_feature(form: str) -> None:
    """What a format says it can write is constant, or a projection onto a given direction."""
    for name in FORMATS[form].words.operators:
        operator = OPERATORS[name]
        if operator.dense:
            continue
        one, other = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 9.0)
        strength = torch.full((1, 1, 1), 2.0)
        assert torch.equal(operator.coefficient(one, strength), operator.coefficient(other, strength)), name


@pytest.mark.parametrize("form", ["gguf", "easysteer"])
def test_a_lossy_export_is_the_plan_that_is_measured(
    tmp_path: Path, lm: LanguageModel, sae: Sae, gated: Plan, form: str
) -> None:
    found = written(lm, gated, form, tmp_path / f"v{FORMATS[form].suffix}", sae, lossy=Lossy(limit=2))
    assert steered_replies(lm, import_plan(str(found.path), lm)) == steered_replies(lm, found.plan, sae)
    said = json.loads(found.sidecar.read_text())
    assert not said["exact"] and len(said["left_out"]) >= 2
    assert all(one["instead"] for one in said["left_out"])
    measured = said["difference"]
    assert measured["kl"] > (0.001 if form == "easysteer" else 0.1) and measured["n_tokens"] > 20
    rows = {row["suite"]: row for row in measured["refusals"]}
    assert {"harmful", "benign"} <= rows.keys()
    assert rows["harmful"]["plan"]["value"] == 1.0 and rows["harmful"]["plan"]["n"] == 2


def test_a_plan_does_not_differ_from_itself(lm: LanguageModel, sae: Sae, gated: Plan) -> None:
    data = embedded_prompts()
    shown = data.only(["harmful", "benign"]).known(Split.VALIDATION, 3)
    found = difference(bound(lm, gated, sae), gated, shown, judge_for(None, lm, data), max_new_tokens=12)
    assert found.kl == pytest.approx(0.0, abs=1e-6) and found.top1_agreement == 1.0
    assert [row.flipped for row in found.refusals] == [0, 0]


def test_the_mean_effect_is_that_of_a_full_encoding(lm: LanguageModel, sae: Sae) -> None:
    edit = Edit(site=SITE, operator="clamp", features=(352, 7), strengths=(30.0, -2.0))
    prompts = [prompt for suite in suites(Split.DISCOVERY, 3) for prompt in suite.prompts][:6]
    amounts, vector = mean_effect(edit, bound(lm, Plan.of(lm, [sae], [edit], "x"), sae), prompts)
    rows = []
    for prompt in prompts:
        batch = pad_left([encode(lm, prompt.messages)], lm.pad_id)
        rows.append(forward_to(lm, batch, [sae.cfg.site])[sae.cfg.site][0])
    code = sae.encode(torch.cat(rows))[:, [352, 7]]
    expected = (torch.tensor([30.0, -2.0]) - code).mean(0)
    torch.testing.assert_close(amounts, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vector, expected @ sae.W_dec[[352, 7]], atol=1e-4, rtol=1e-4)


def test_sinks_that_a_plan_leaves_out_are_said() -> None:
    lm = tiny_llama()
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[lm.tokenizer.convert_tokens_to_ids("<bos>")] *= 300.0
    site = Site(1)
    assert sinks_at(lm, [site])[site]
    plan = Plan.of(lm, [], [dense("add_direction", site.name)], "x", vectors={"v": random_vector(lm.d_model)})
    words = FORMATS["gguf"].words
    assert ["attention sinks" in one.what for one in unsaid(bound(lm, plan), words)] == [True]
    assert not unsaid(bound(lm, plan.changed(sinks="include")), words)


def test_a_lossy_export_needs_something_to_measure_it_on(tmp_path: Path) -> None:
    lm = tiny_llama()
    edit = dense("add_direction", "blocks.1.hook_resid_post", scope="prompt")
    plan = Plan.of(lm, [], [edit], "x", vectors={"v": random_vector(lm.d_model)})
    with pytest.raises(PromptSetError, match="measured against its plan"):
        written(lm, plan, "gguf", tmp_path / "v.gguf", lossy=Lossy())


def test_a_plan_that_changes_nothing_and_an_unknown_format(tmp_path: Path, lm: LanguageModel, sae: Sae) -> None:
    with pytest.raises(ExportError, match="changes nothing"):
        written(lm, Plan.of(lm, [sae], [add(strengths=(0.0, 0.0))], "x"), "gguf", tmp_path / "v", sae)
    with pytest.raises(ExportError, match="no format is called"):
        written(lm, Plan.of(lm, [sae], [add()], "x"), "onnx", tmp_path / "v", sae)


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path, lm: LanguageModel, sae: Sae) -> None:
    plan = Plan.of(lm, [sae], [add()], "x")
    (tmp_path / "file").write_text("")
    for form in ("gguf", "svec", "checkpoint"):
        with pytest.raises(ClampdownError, match=r"cannot (write|save)"):
            written(lm, plan, form, tmp_path / "file" / "v", sae)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    from clampdown.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["clampdown", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_line_refuses_writes_and_reads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = SHIPPED / "clamp-352-everywhere.toml"
    assert run(monkeypatch, "export", plan, "--to", "gguf") == 2
    assert "cannot say" in capsys.readouterr().err
    assert run(monkeypatch, "export", plan, "--to", "gguf", "--lossy", "--limit", "1", "--out", "v.gguf") == 0
    shown = capsys.readouterr().out
    assert "instead, its mean effect" in shown and "KL(plan || export)" in shown and "refusals of harmful" in shown
    assert run(monkeypatch, "import", "v.gguf", "--model", ORGANISM, "--out", "back.toml") == 0
    assert read_plan(Path("back.toml")).edits[0].operator == "add_direction"
    capsys.readouterr()
    assert run(monkeypatch, "export", "x", "--to", "list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FORMATS)
