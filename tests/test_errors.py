"""What bad input gets: every row of the design's list is one typed error, and through the command line exit code 2.

Each row makes the bad input in a directory of its own, says which command meets it, which class of error it is, what
the message must name and whether it says what to do. Rows that another file tests name it.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import XGLMConfig, XGLMForCausalLM

from clampdown.cli import main as cli
from clampdown.config import embedded_model, embedded_sae
from clampdown.errors import (
    ChatTemplateError,
    CheckpointError,
    ClampdownError,
    FeatureIndexError,
    PickleCheckpointError,
    PlanError,
    PlanMismatchError,
    PromptSetError,
    SiteError,
    StrengthError,
    UnknownArchitectureError,
    WidthMismatchError,
)
from clampdown.models.loading import load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, write_plan
from tests.saes import files
from tests.saes.conftest import random_sae

Args = list[str]
SITE = "blocks.3.hook_resid_post"


@dataclass(frozen=True)
class Row:
    """One kind of bad input: `make` writes it and returns the command line that meets it."""

    what: str
    error: type[ClampdownError]
    message: str
    make: Callable[[Path], Args]
    hint: bool = True


def weights() -> Path:
    found = embedded_model("organism")
    assert found is not None
    return found


def plan_file(root: Path, *, replace: tuple[str, str] = ("", ""), extra: str = "", **edit: object) -> Path:
    """A plan for the embedded model, with something wrong in it."""
    lm, sae = load_model("organism"), load_sae("organism")
    fields = {"site": SITE, "operator": "clamp", "features": (5,), "strengths": (2.0,), **edit}
    site = str(fields["site"])
    plan = Plan(
        name="p",
        model=ModelRef(name="organism", revision=lm.revision),
        saes=(SaeRef(site=site, name="organism", revision=sae.revision),),
        edits=(Edit(**fields),),  # type: ignore[arg-type]
    )
    path = root / "plan.toml"
    write_plan(path, plan)
    kept = [line for line in path.read_text().splitlines() if not line.startswith("digest")]
    path.write_text(extra + "\n".join(kept).replace(*replace) if replace[0] else extra + "\n".join(kept))
    return path


def chat(plan: Path) -> Args:
    return ["chat", "--prompt", "hello", "--plan", str(plan)]


def other_revision(of: str) -> tuple[str, str]:
    revision = load_model("organism").revision if of == "model" else load_sae("organism").revision
    return (revision, "0123456789abcdef")


def unknown_architecture(root: Path) -> Args:
    shutil.copytree(weights(), root / "m", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    small = XGLMConfig(vocab_size=1536, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)
    XGLMForCausalLM(small).save_pretrained(root / "m")
    return ["chat", "--prompt", "hello", "--model", str(root / "m")]


def no_template(root: Path) -> Args:
    shutil.copytree(weights(), root / "m", ignore=shutil.ignore_patterns("chat_template*"))
    config = root / "m" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    return ["chat", "--prompt", "hello", "--model", str(root / "m")]


def make_with_sae(path: Path, *more: str) -> Args:
    return ["plan", "make", "--feature", "3", "--strength", "1", "--sae", str(path), *more]


class Surprise:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def pickled(root: Path) -> Args:
    path = files.dictionary_learning(random_sae("relu"), root)
    (path / "ae.pt").write_bytes(pickle.dumps({"W": Surprise()}))
    return make_with_sae(path)


def moved_gemma(root: Path) -> Path:
    return files.gemma_scope(random_sae(centred=False), root).rename(root / "somewhere")


def prompts(root: Path, text: str) -> Args:
    path = root / "prompts.jsonl"
    path.write_text(text)
    return ["discover", "--harmful", str(path), "--harmless", str(path), "--finder", "contrast", "--no-check"]


def lost_sae(root: Path) -> Args:
    source = embedded_sae("organism")
    assert source is not None
    shutil.copytree(source, root / "sae")
    (root / "sae" / "sae_weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return make_with_sae(root / "sae")


MAKE = ["plan", "make", "--feature", "5"]
ROWS = (
    Row("unknown architecture", UnknownArchitectureError, "'xglm'", unknown_architecture),
    Row(
        "SAE/model width mismatch",
        WidthMismatchError,
        "reads 12 values per token",
        lambda r: make_with_sae(files.saelens(random_sae(), r)),
    ),
    Row("hook point: not a name", SiteError, "'layer 3'", lambda r: make_with_sae(moved_gemma(r), "--site", "layer 3")),
    Row(
        "hook point: not said",
        CheckpointError,
        "do not say where it sits",
        lambda r: make_with_sae(moved_gemma(r)),
    ),
    Row(
        "hook point: not in the model",
        SiteError,
        "5 blocks",
        lambda r: chat(plan_file(r, site="blocks.99.hook_resid_post")),
    ),
    Row(
        "feature out of range",
        FeatureIndexError,
        "feature 512 does not exist",
        lambda r: chat(plan_file(r, features=(512,))),
    ),
    Row(
        "feature out of range, asked for",
        FeatureIndexError,
        "feature 99999",
        lambda _: ["plan", "make", "--feature", "99999", "--strength", "1"],
    ),
    Row("strength not finite", StrengthError, "not a finite", lambda _: [*MAKE, "--strength", "nan"], hint=False),
    Row(
        "strength not finite, in a plan",
        PlanError,
        "finite",
        lambda r: chat(plan_file(r, replace=("2.0", "inf"))),
        False,
    ),
    Row(
        "strength without a scale",
        StrengthError,
        "plain number",
        lambda _: [*MAKE, "--strength", "2p99", "--operator", "scale"],
    ),
    Row("chat template missing", ChatTemplateError, "no chat template", no_template),
    Row(
        "plan for another model",
        PlanMismatchError,
        "revision 0123456789abcdef",
        lambda r: chat(plan_file(r, replace=other_revision("model"))),
    ),
    Row(
        "plan for another SAE",
        PlanMismatchError,
        "revision 0123456789abcdef",
        lambda r: chat(plan_file(r, replace=other_revision("sae"))),
    ),
    Row("unknown plan keys", PlanError, "surprise", lambda r: chat(plan_file(r, extra="surprise = 1\n")), hint=False),
    Row(
        "unknown plan version",
        PlanError,
        "schema_version is 7",
        lambda r: chat(plan_file(r, replace=("schema_version = 1", "schema_version = 7"))),
        False,
    ),
    Row("unknown operator", PlanError, "'explode'", lambda _: [*MAKE, "--strength", "1", "--operator", "explode"]),
    Row("pickle-only checkpoint", PickleCheckpointError, "run code", pickled),
    Row(
        "malformed checkpoint",
        CheckpointError,
        "needs 'W_enc', which is missing",
        lost_sae,
    ),
    Row("no such SAE", CheckpointError, "no SAE at", lambda r: make_with_sae(r / "none")),
    Row("empty prompt set", PromptSetError, "prompts.jsonl", lambda r: prompts(r, "")),
    Row("unlabelled prompt set", PromptSetError, "prompts.jsonl", lambda r: prompts(r, '{"text_of_it": "x"}\n'), False),
    Row(
        "malformed prompt set, with its line",
        PromptSetError,
        "line 2",
        lambda r: prompts(r, '{"prompt": "x"}\n{"prompt": \n'),
        False,
    ),
)
# What the design's list names beyond these, and the files that test it.
ELSEWHERE = {
    "judge unreachable": "evaluation/test_runner.py::test_a_judge_that_fails_loses_nothing_and_judges_nothing_twice",
    "disk full": "test_store.py::test_a_full_disk_is_a_named_error_and_loses_nothing_that_was_stored",
    "scope that cannot act": "steering/test_hooks.py::test_what_did_not_happen_is_an_error",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_bad_input_is_one_typed_error_and_exit_code_2(row: Row, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["clampdown", *row.make(tmp_path)])
    monkeypatch.chdir(tmp_path)
    raised: list[ClampdownError] = []
    inner = cli.app

    def watched() -> None:
        try:
            inner()
        except ClampdownError as error:
            raised.append(error)
            raise

    monkeypatch.setattr(cli, "app", watched)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert raised, f"no error of ours: {shown.err}"
    assert stopped.value.code == 2
    assert isinstance(raised[0], row.error), type(raised[0])
    assert row.message in shown.err
    assert "hint:" in shown.err or not row.hint
    assert "Traceback" not in shown.err + shown.out
    assert "executed" not in shown.err + shown.out


@pytest.mark.parametrize("where", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_rest_of_the_list_is_tested_where_it_says(where: str) -> None:
    path, _, name = where.partition("::")
    assert f"def {name}(" in (Path(__file__).parent / path).read_text()
