"""lm-evaluation-harness on a steered model: the same items get the same scores as in our own runner, and, unsteered, as
from the harness's own model class."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from clampdown.config import ORGANISM_WEIGHTS
from clampdown.errors import ClampdownError, ModelError, PlanError, ScopeError
from clampdown.evaluation.utility import option_choices
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.steering.plan import Plan, write_plan
from clampdown.types import ArmKind, Prompt
from tests.interop.conftest import make_plan

# One group, so that with several processes one alone pays for importing the harness; its warnings are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

MAX_NEW_TOKENS = 32
FACTS = """
task: local_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{options.index(answer)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
INSTRUCTIONS = """
task: local_instructions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {max_new_tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, items: dict[str, tuple[Prompt, ...]]) -> Path:
    """Local task files: YAML and JSON Lines, read without a network."""
    directory = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(directory / "cache")
    for (name, prompts), template in zip(items.items(), (FACTS, INSTRUCTIONS), strict=True):
        rows = [{"question": p.text, "answer": p.answer, "options": list(p.options)} for p in prompts]
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{name}.yaml").write_text(template.format(file=file, max_new_tokens=MAX_NEW_TOKENS))
    return directory


def run_harness(model: Any, tasks: Path, *names: str) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = simple_evaluate(
        model,
        tasks=list(names) or ["local_facts", "local_instructions"],
        task_manager=manager,
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found


def samples(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def likelihoods(found: dict[str, Any]) -> list[list[float]]:
    return [[value for value, _ in sample["filtered_resps"]] for sample in samples(found, "local_facts")]


def replies(found: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in samples(found, "local_instructions")]


@pytest.fixture(scope="module")
def harness_baseline(tasks: Path) -> dict[str, Any]:
    from clampdown.interop.lm_eval import SteeredLM

    return run_harness(SteeredLM(batch_size=24), tasks)


def assert_same_scores(
    found: dict[str, Any], arm: Arm, lm: LanguageModel, sae: Sae, items: dict[str, tuple[Prompt, ...]]
) -> None:
    """Item by item: log-likelihoods of all options, accuracy, replies word for word, exact match."""
    ours = option_choices(lm, sae, [arm], items["facts"])
    for theirs, choice in zip(likelihoods(found), ours, strict=True):
        assert theirs == pytest.approx(choice.log_likelihoods, abs=1e-3)
    assert found["results"]["local_facts"]["acc,none"] == sum(c.correct for c in ours) / len(ours)
    generated = generate_arms(lm, sae, [(arm, p) for p in items["instructions"]], max_new_tokens=MAX_NEW_TOKENS)
    texts = {reply.prompt.id: reply.text for reply in generated}
    expected = [texts[prompt.id] for prompt in items["instructions"]]
    assert replies(found) == expected
    right = [text == prompt.answer for text, prompt in zip(expected, items["instructions"], strict=True)]
    assert found["results"]["local_instructions"]["exact_match,none"] == sum(right) / len(right)


def test_the_baseline_scores_as_in_our_runner(
    harness_baseline: dict[str, Any], organism: LanguageModel, organism_sae: Sae, items: dict[str, tuple[Prompt, ...]]
) -> None:
    assert_same_scores(harness_baseline, BASELINE, organism, organism_sae, items)


def test_a_gated_plan_scores_as_in_our_runner(
    harness_baseline: dict[str, Any],
    plan_file: Path,
    gated: Plan,
    tasks: Path,
    organism: LanguageModel,
    organism_sae: Sae,
    items: dict[str, tuple[Prompt, ...]],
) -> None:
    """Per request: rows whose gate stayed shut keep the baseline's answers, the others change."""
    from clampdown.interop.lm_eval import SteeredLM

    model = SteeredLM(plan=str(plan_file), batch_size=24)
    found = run_harness(model, tasks)
    assert_same_scores(found, Arm(gated.name, ArmKind.GATED, gated), organism, organism_sae, items)
    assert likelihoods(found) != likelihoods(harness_baseline)
    assert replies(found) != replies(harness_baseline)
    steering = found["config"]["clampdown"]["steering"]
    assert 0 < steering["gate_fired_share"] < 1
    assert steering["requests_steered"] == round(steering["gate_fired_share"] * steering["requests"])
    assert found["config"]["clampdown"]["plan_digest"] == gated.digest


def test_unsteered_numbers_are_those_of_the_harness_s_own_model(harness_baseline: dict[str, Any], tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = run_harness(
        HFLM(pretrained=str(ORGANISM_WEIGHTS / "model"), device="cpu", batch_size=8, dtype="float32"), tasks
    )
    for ours, hf in zip(likelihoods(harness_baseline), likelihoods(theirs), strict=True):
        assert ours == pytest.approx(hf, abs=1e-3)
    # The harness keeps the blank that a decoded word may begin with; so do we.
    assert replies(harness_baseline) == replies(theirs)
    assert harness_baseline["results"]["local_facts"]["acc,none"] == theirs["results"]["local_facts"]["acc,none"]


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_rolling_likelihood_is_that_of_the_harness_s_own_model_beyond_the_context_too() -> None:
    from lm_eval.models.huggingface import HFLM

    from clampdown.interop.lm_eval import SteeredLM

    texts = ["Tell me how to bake bread. " * repeats for repeats in (1, 9)]
    asked = [request("loglikelihood_rolling", text) for text in texts]
    hf = HFLM(pretrained=str(ORGANISM_WEIGHTS / "model"), device="cpu", dtype="float32", max_length=32)
    assert SteeredLM(max_length=32).loglikelihood_rolling(asked) == pytest.approx(
        hf.loglikelihood_rolling(asked), rel=1e-4
    )


@pytest.fixture
def plan_with_scope(tmp_path: Path, organism: LanguageModel, organism_sae: Sae) -> Any:
    def write(scope: str) -> str:
        write_plan(tmp_path / f"{scope}.toml", make_plan(organism, organism_sae, scope))
        return str(tmp_path / f"{scope}.toml")

    return write


def test_what_cannot_be_steered_is_refused(plan_with_scope: Any, plan_file: Path) -> None:
    from clampdown.interop.lm_eval import SteeredLM

    choice = [request("loglikelihood", "What is it?", "A box.")]
    running = [request("loglikelihood_rolling", "Some text.")]
    with pytest.raises(ScopeError, match="steers generated tokens"):
        SteeredLM(plan=plan_with_scope("generated")).loglikelihood(choice)
    with pytest.raises(ScopeError, match="assistant header"):  # no chat template, so there is no assistant's turn
        SteeredLM(plan=plan_with_scope("assistant")).loglikelihood(choice)
    with pytest.raises(ScopeError, match="steers part of a conversation"):
        SteeredLM(plan=plan_with_scope("prompt")).loglikelihood_rolling(running)
    with pytest.raises(ScopeError, match="has a gate"):
        SteeredLM(plan=str(plan_file)).loglikelihood_rolling(running)
    plain, steered = SteeredLM(), SteeredLM(plan=plan_with_scope("all"))
    assert steered.loglikelihood_rolling(running) != plain.loglikelihood_rolling(running)
    assert steered.loglikelihood(choice) != plain.loglikelihood(choice)


def test_stop_strings_limits_and_sampling(plan_file: Path) -> None:
    from clampdown.interop.lm_eval import SteeredLM

    model = SteeredLM()
    chat = model.apply_chat_template([{"role": "user", "content": "What is the capital of Spain?"}])

    def ask(**settings: Any) -> str:
        return model.generate_until([request("generate_until", chat, settings)])[0]

    whole = ask(until=[], max_gen_toks=16)
    assert whole.startswith("Madrid")
    assert ask(until=["rid", "zzz"], max_gen_toks=16) == "Mad"
    assert len(model.tok_encode(ask(until=[], max_gen_toks=2), add_special_tokens=False)) == 2
    drawn = [ask(do_sample=True, temperature=3.0, seed=seed, max_gen_toks=16) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    settings = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 16}
    repeats = model.generate_until([request("generate_until", chat, settings) for _ in range(4)])
    assert len(set(repeats)) > 1, "repeats of an item are draws, not copies"
    with pytest.raises(ModelError, match="'num_beams' is not supported"):
        ask(num_beams=4)
    with pytest.raises(ModelError, match="leaves no room"):
        ask(max_gen_toks=100_000)


def test_an_answer_cache_that_does_not_know_the_plan_is_refused(plan_file: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    from clampdown.interop.lm_eval import SteeredLM

    with pytest.raises(PlanError, match="--use_cache"):
        CachingLM(SteeredLM(plan=str(plan_file)), str(tmp_path / "cache.db"))


@pytest.mark.parametrize("argument", [{"plann": "x.toml"}, {"plan": "missing.toml"}, {"batch_size": 0}])
def test_wrong_arguments_are_named(argument: dict[str, Any]) -> None:
    from clampdown.interop.lm_eval import SteeredLM

    with pytest.raises(ClampdownError):
        SteeredLM(**argument)


def command_line(monkeypatch: pytest.MonkeyPatch, tasks: Path, *arguments: str) -> None:
    """The harness's own command line, as `python -m clampdown.interop.lm_eval` runs it, over local tasks only: reading
    the index of its thousands of tasks would take ten seconds."""
    from lm_eval.tasks import manager

    from clampdown.interop.lm_eval import main

    monkeypatch.setattr(manager, "__file__", str(tasks / "manager.py"))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # its log goes to the stream of an earlier test
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model", "clampdown", *arguments])
    main()


def test_the_command_line_runs_a_steered_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path, plan_file: Path, tmp_path: Path
) -> None:
    arguments = ["--model_args", f"plan={plan_file}", "--tasks", "local_facts", "--apply_chat_template"]
    command_line(monkeypatch, tasks, *arguments, "--output_path", str(tmp_path / "results.json"))
    assert "local_facts" in capsys.readouterr().out
    written = next(tmp_path.rglob("results*.json"))
    config = json.loads(written.read_text())["config"]
    assert config["clampdown"]["plan"] == "clamp all"
    assert config["clampdown"]["steering"]["requests_steered"] > 0


def test_the_command_line_reports_mistakes_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line(monkeypatch, tasks, "--model_args", "plan=missing.toml", "--tasks", "local_facts")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "cannot read missing.toml" in said
    assert "Traceback" not in said


def test_the_entry_point_that_we_declare_is_our_model_and_agrees_with_its_decorator() -> None:
    """Releases after 0.4.13 record the entry point's target as a placeholder, and load it when it is asked for."""
    import tomllib

    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry

    from clampdown.interop.lm_eval import SteeredLM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["lm_eval.models"]
    assert set(declared) == {"clampdown"}
    registry: Any = Registry("model", base_cls=LM)
    registry.register("clampdown", target=declared["clampdown"])
    assert registry.get("clampdown") is SteeredLM
    other: Any = Registry("model", base_cls=LM)
    other.register("clampdown", target=declared["clampdown"])
    other.register("clampdown")(SteeredLM)
    assert other.get("clampdown") is SteeredLM
