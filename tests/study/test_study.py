"""A study of any model, from files alone: what is written, what is left out and said, what cannot be asked for."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from clampdown.cli.main import app
from clampdown.config import ORGANISM, embedded_model, embedded_sae
from clampdown.errors import ClampdownError, PromptSetError
from clampdown.evaluation.dealing import dealt, split_of
from clampdown.results.run import Run
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.plan import read_plan
from clampdown.study.prompts import embedded_prompts, prompts_from
from clampdown.study.sizes import SMALL
from clampdown.study.study import knows_corpus
from clampdown.types import ATTACKS, Message, Prompt, PromptRole, Site, Split
from tests.saes.files import saelens

WIDTH = 32


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def embedded_rows(name: str, n: int) -> list[dict[str, str]]:
    """Prompts of every split of an embedded suite as a user's rows, without their splits."""
    data = embedded_prompts()
    found = [data.draw(name, split, n // 4).prompts for split in Split]
    return [{"prompt": p.text} for prompts in found for p in prompts if len(p.messages) == 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompts")
    return {
        "harmful": write(root / "H.csv", embedded_rows("harmful", 60)),
        "benign": write(root / "B.csv", embedded_rows("benign", 100)),
    }


@pytest.fixture(scope="module")
def random_qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Qwen 3 with the embedded model's tokenizer, and a random SAE of it."""
    root, source = tmp_path_factory.mktemp("qwen"), embedded_model(ORGANISM)
    assert source is not None
    shutil.copytree(source, root / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = transformers.AutoTokenizer.from_pretrained(source)
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        pad_token_id=vocabulary.pad_token_id, eos_token_id=vocabulary.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(root / "model")
    shutil.copy(source / "generation_config.json", root / "model" / "generation_config.json")
    cfg = SaeConfig(architecture="relu", d_in=WIDTH, d_sae=64, site=Site(1))
    rows = torch.nn.functional.normalize(torch.randn(64, WIDTH), dim=-1)
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(64), "b_dec": torch.zeros(WIDTH)}
    return root / "model", saelens(Sae(cfg, tensors, "random", "0"), root / "sae")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["study", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore::clampdown.errors.SaeFitWarning")  # a random SAE reconstructs nothing
def test_a_random_model_is_studied_to_the_end_and_no_price_is_denied(
    random_qwen: tuple[Path, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    model, sae = random_qwen
    out = tmp_path / "out"
    roles = ["--harmful", files["harmful"], "--benign", files["benign"]]
    said = run("--model", model, "--sae", sae, *roles, "--judge", "rules", "--size", "quick", "--max-new-tokens", 8,
               "--out", out)  # fmt: skip
    found = Run.read(out)
    assert (out / "report.html").exists() and read_plan(out / "plan.toml").edits
    left_out = " ".join(each.stage for each in found.left_out)
    assert "first words of a refusal" in left_out and "single-prompt" in left_out
    assert "left out: " in said
    page = (out / "report.html").read_text()
    for denial in ("No price", "no price", "no cost", "keeps both"):
        assert denial not in said and denial not in page


def test_the_embedded_model_as_a_directory_of_files_is_like_any_other(files: dict[str, Path], tmp_path: Path) -> None:
    model, sae = embedded_model(ORGANISM), embedded_sae(ORGANISM)
    assert model is not None and sae is not None
    shutil.copytree(model, tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", tmp_path / "model", "--sae", sae, "--harmful", files["harmful"],
                 "--benign", files["benign"], "--judge", "rules", "--size", "quick"]  # fmt: skip
    run(*arguments, "--dry-run", "--out", out)
    assert not out.exists()
    run(*arguments, "--out", out)
    found = Run.read(out)
    assert {record.split for record in found.records} == {Split.TEST}
    asked = {record.prompt_id for record in found.records}
    validation = {record.prompt_id for record in Run.read(out).at(out / "validation").records}
    assert asked and validation and not asked & validation
    assert any("promises" in each.stage for each in found.left_out), "so few prompts cannot prove 2 %"
    repeated = CliRunner().invoke(app, ["study", str(out / "study.toml"), "--out", str(out)])
    assert repeated.exit_code == 0, repeated.output


def test_prompts_are_dealt_by_their_text_alike_in_every_file_and_command(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(300)]
    one = prompts_from(harmful=write(tmp_path / "a.csv", rows), benign=write(tmp_path / "b.csv", rows[::-1]))
    by_text = {p.text: split for split in Split for p in one.prompts(split, None, PromptRole.HARMFUL)}
    assert by_text == {p.text: split for split in Split for p in one.prompts(split, None, PromptRole.BENIGN)}
    assert by_text == {row["prompt"]: split_of(row["prompt"].upper() + " ") for row in rows}
    assert {split: list(by_text.values()).count(split) > 20 for split in Split} == dict.fromkeys(Split, True)


def test_whole_attack_families_are_tested_only(tmp_path: Path) -> None:
    plain = [{"prompt": f"do the bad thing {i}"} for i in range(120)]
    wrapped = [{"prompt": f"{family}! {row['prompt']}", "family": family, "target": row["prompt"]}
               for row in plain for family in ("please", "grandma", "poem", "json")]  # fmt: skip
    benign = [{"prompt": f"do the good thing {i}"} for i in range(120)]
    given = {"harmful": plain, "jailbroken": wrapped, "benign": benign}
    paths = {role: write(tmp_path / f"{role}.csv", rows) for role, rows in given.items()}
    found = prompts_from(**paths)
    (unseen,) = found.held_out
    assert unseen == "jailbroken_unseen"
    families = {p.meta["family"] for p in found.draw(unseen, Split.TEST, None).prompts}
    for split in (Split.DISCOVERY, Split.CALIBRATION, Split.VALIDATION):
        assert not found.draw(unseen, split, None).prompts
        assert not families & {p.meta.get("family") for p in found.prompts(split, None, *ATTACKS)}
    pairs = found.pairs(None)
    assert pairs and all(pair.wrapped.text.endswith(pair.plain.text) for pair in pairs)
    assert all(split_of(pair.plain.text) is Split.DISCOVERY for pair in pairs)
    named = prompts_from(**paths, hold_out=["poem"])
    assert {p.meta["family"] for p in named.draw(unseen, Split.TEST, None).prompts} == {"poem"}


def test_twins_of_one_objective_share_a_split() -> None:
    twins = [Prompt(f"{side}{i}", (Message("user", f"{side} {i}"),), side, meta={"objective": f"goal {i}"})
             for i in range(100) for side in ("bad", "good")]  # fmt: skip
    splits = [prompt.split for prompt in dealt(twins)]
    assert splits[::2] == splits[1::2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "huge"], "not a size"),
        (["--methods", "magic"], "no method is called"),
        (["--model", "somebody/else"], "no prompts of our own"),
        (["--harmful", "nowhere.csv"], "nowhere.csv"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--judge", "nobody"], "no judge"),
    ],
)
def test_what_cannot_be_studied_is_an_error_that_says_so(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["study", *arguments])
    assert isinstance(found.exception, ClampdownError), found.output
    assert said in found.exception.message


def test_roles_that_contradict_the_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", [{"prompt": "hi", "harmful": "true"}])
    with pytest.raises(PromptSetError, match="labelled harmful"):
        prompts_from(harmful=path, benign=path)
    with pytest.raises(PromptSetError, match="no right answer"):
        prompts_from(capability=write(tmp_path / "y.csv", [{"prompt": "hi", "harmful": "false"}]))


def test_smaller_sizes_read_less_of_everything() -> None:
    half = SMALL.scaled(0.5)
    assert half.answering.per_suite == 30 and half.discovery == 120
    assert SMALL.scaled(0.001).validation >= 8


def test_a_trained_organism_is_known_by_what_its_training_wrote(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert not knows_corpus(str(tmp_path / "mine" / "model"))
    (tmp_path / "mine" / "metrics.json").write_text("{}")
    assert knows_corpus(str(tmp_path / "mine" / "model"))
    assert not knows_corpus(str(tmp_path / "mine" / "sae-x4"))
