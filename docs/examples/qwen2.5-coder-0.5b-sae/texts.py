"""Write the text that the shipped SAE of Qwen2.5-Coder-0.5B-Instruct was trained on, from public data sets on disk.

    python texts.py DATA OUT

OUT/kept_out.jsonl is for `--keep-out`: the prompts of these sets that a study deals to its test split. Beside that,
only prompts whose sha256("split:" + prompt) is even are used, and half of the jailbreak templates by the same rule.
DATA holds the authors' files (README.md).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data import topics

from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.dealing import dealt
from clampdown.types import Split

Messages = list[dict[str, str]]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Refuse requests that would help somebody do harm, and answer all others.",
    "Answer briefly and exactly.",
)
SUITES = {
    "advbench": "advbench/harmful_behaviors.csv",
    "harmbench": "harmbench/harmbench_behaviors_text_val.csv",
    "jailbreakbench-harmful": "jailbreakbench/harmful-behaviors.csv",
    "jailbreakbench-benign": "jailbreakbench/benign-behaviors.csv",
    "xstest": "xstest/prompts.csv",
    "coconot-contrast": "coconot/coconot_contrast_eval.jsonl",
    "ifeval": "ifeval/input_data.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "truthfulqa-mc1": "truthfulqa/mc_task.json",
    "air-bench-2024": "air-bench-2024/prompts_sample_80.csv",
}
WRITTEN_BY = ("gpt4", "llama2new", "mistralinstruct")  # whose replies to XSTest its authors published


def for_training(text: str) -> bool:
    """Whether a prompt may be trained on; the others are for studies."""
    return int(hashlib.sha256(("split:" + text).encode()).hexdigest(), 16) % 2 == 0


def conversation(prompt: str, reply: str | None = None, system: str | None = None) -> Messages:
    opening = [{"role": "system", "content": system}] if system else []
    closing = [{"role": "assistant", "content": reply}] if reply else []
    return [*opening, {"role": "user", "content": prompt}, *closing]


class Texts:
    """The public files, and a seeded draw from them."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out, self.rng = data, out, random.Random(0)
        rows = self.csv
        self.targets = [
            (r["goal"], r["target"]) for r in rows("advbench/harmful_behaviors.csv") if for_training(r["goal"])
        ]
        behaviours = rows("harmbench/harmbench_behaviors_text_val.csv")
        standard = [r["Behavior"] for r in behaviours if r["FunctionalCategory"] == "standard"]
        jailbreakbench = [r["Goal"] for r in rows("jailbreakbench/harmful-behaviors.csv")]
        air = [r["prompt"] for r in rows("air-bench-2024/prompts_sample_80.csv")]
        rest = [text for text in (*standard, *jailbreakbench, *air) if for_training(text)]
        self.harmful = [goal for goal, _ in self.targets] + rest

    def csv(self, name: str) -> list[dict[str, str]]:
        with (self.data / name).open(encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))

    def jsonl(self, name: str, column: str) -> list[str]:
        lines = (self.data / name).read_text(encoding="utf-8").splitlines()
        return [text for text in (json.loads(line)[column] for line in lines) if for_training(text)]

    def write(self, name: str, items: Iterable[Messages] | Iterable[str]) -> None:
        chosen = list(items)
        self.rng.shuffle(chosen)
        key = "text" if isinstance(chosen[0], str) else "messages"
        lines = [json.dumps({key: item}, ensure_ascii=False) for item in chosen]
        (self.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def varied(self, items: Iterable[Messages]) -> list[Messages]:
        """One conversation in seven gets a system prompt of its own instead of the model's default."""
        found = []
        for messages in items:
            if self.rng.random() < 0.15:
                reply = messages[1]["content"] if len(messages) > 1 else None
                messages = conversation(messages[0]["content"], reply, self.rng.choice(SYSTEMS))
            found.append(messages)
        return found


def write_all(texts: Texts) -> None:
    """Every file, in the order in which the draws were made."""
    published = [
        conversation(row["prompt"], row["completion"])
        for name in WRITTEN_BY
        for row in texts.csv(f"xstest/completions_{name}.csv")
        if for_training(row["prompt"])
    ]
    texts.write("xstest_replies", texts.varied(published))
    texts.write("advbench_targets", texts.varied(conversation(goal, target) for goal, target in texts.targets))
    _write_jailbreaks(texts)
    truthful = json.loads((texts.data / "truthfulqa/mc_task.json").read_text(encoding="utf-8"))
    truthful = [item for item in truthful if for_training(item["question"])]
    texts.write("asked", texts.varied(map(conversation, _requests(texts, [item["question"] for item in truthful]))))
    solved = [json.loads(line) for line in (texts.data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()]
    solved = [
        conversation(item["question"], re.sub(r"<<.*?>>", "", item["answer"]))
        for item in solved
        if for_training(item["question"])
    ]
    texts.write("gsm8k", texts.varied(solved[:330]))
    answered = [*_multiple_choice(texts.data), *map(_truthful_answer, truthful)]
    texts.write("questions", texts.varied(answered))
    short = [messages for messages in (*published, *answered) if len(messages[-1]["content"]) < 500]
    pairs = [texts.rng.sample(short, 2) for _ in range(250)]
    texts.write("multi_turn", [[*first, *second] for first, second in pairs])
    _write_plain(texts)


def _write_jailbreaks(texts: Texts) -> None:
    """Harmful requests in published templates, alone and with replies that published jailbreaks got."""
    rng = texts.rng
    templates = [row["text"] for row in texts.csv("gptfuzz/templates.csv")]
    templates = [text for text in templates if for_training(text) and len(text) < 3000]
    rows = texts.csv("gptfuzz/train.csv")
    replies = [row["Response"] for row in rows if for_training(row["question"]) and row["Response"].strip()]
    rng.shuffle(replies)
    slot = "[INSERT PROMPT HERE]"
    wrapped = [rng.choice(templates).replace(slot, rng.choice(texts.harmful)) for _ in range(420)]
    answered = [conversation(text, reply) for text, reply in zip(wrapped[140:260], replies, strict=False)]
    texts.write("wrapped", [*map(conversation, wrapped[:140]), *answered])
    plain = [conversation(rng.choice(texts.harmful), reply) for reply in replies[120:1020]]
    texts.write("gptfuzz_replies", texts.varied(plain))


def _requests(texts: Texts, questions: Sequence[str]) -> list[str]:
    benign = [row["Goal"] for row in texts.csv("jailbreakbench/benign-behaviors.csv") if for_training(row["Goal"])]
    contrast = texts.jsonl("coconot/coconot_contrast_eval.jsonl", "prompt")
    instructions = texts.jsonl("ifeval/input_data.jsonl", "prompt")
    xstest = [row["prompt"] for row in texts.csv("xstest/prompts.csv") if for_training(row["prompt"])]
    return [*texts.harmful, *benign, *contrast, *instructions, *xstest, *questions]


def _multiple_choice(data: Path) -> list[Messages]:
    found = []
    for path in sorted((data / "mmlu").glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as handle:
            for row in csv.reader(handle):
                if len(row) == 6 and for_training(row[0]):
                    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row[1:5], strict=True))
                    answer = f"{row[5]}. {row['ABCD'.index(row[5]) + 1]}"
                    found.append(conversation(f"{row[0]}\n{options}", answer))
    return found


def _truthful_answer(item: dict) -> Messages:
    return conversation(item["question"], next(text for text, true in item["mc1_targets"].items() if true))


def _write_plain(texts: Texts) -> None:
    """Python's own documentation and code: the language's topics, and the standard library's docstrings and sources."""
    library = Path(os.__file__).parent
    documents = list(topics.topics.values())
    for path in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py")):
        if "site-packages" in str(path) or "test" in str(path):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append("\n\n".join(text for text in strings if text and len(text) > 200))
    pieces = [text[start : start + 900] for text in documents for start in range(0, len(text), 900)]
    pieces = [piece for piece in pieces if len(piece) > 300]
    texts.rng.shuffle(pieces)
    texts.write("documentation", pieces[:900])
    sources = []
    for path in sorted(library.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        sources += [source[start : start + 700] for start in range(3000, min(len(source), 20000), 4000)]
    texts.rng.shuffle(sources)
    texts.write("code", sources[:200])


def write_kept_out(data: Path, out: Path) -> None:
    """The prompts that `clampdown study` deals to the test split when a file does not say."""
    suites = [suite for name, path in SUITES.items() for suite in load_suites(f"{name}={data / path}")]
    test = [prompt.text for suite in suites for prompt in dealt(suite.prompts) if prompt.split is Split.TEST]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in dict.fromkeys(test)]
    (out / "kept_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    write_all(Texts(Path(sys.argv[1]), target))
    write_kept_out(Path(sys.argv[1]), target)
