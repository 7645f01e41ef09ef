"""What each arm of a finished study costs on its own model, against the library's plain `generate`.

    python benchmarks/real_model.py RUN [--prompts 8] [--suites borderline jailbroken_unseen] [--json FILE]

RUN is the directory of a study (`clampdown study NAME --out RUN`). Each arm answers the same prompts alone, then all
arms answer them together; each figure is CPU seconds over those of transformers' `generate` on the same padded batch,
taken just before. Replies are cut at the study's length, and every batch goes on until its last reply ends.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from clampdown.evaluation.suites import read_suites
from clampdown.models.chat import encode, pad_left
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.steering.plan import read_plan
from clampdown.study.planned import SPEC
from clampdown.study.recipes.schema import read_toml
from clampdown.study.spec import parse_spec
from clampdown.types import ArmKind, Prompt


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--suites", nargs="+", default=["borderline", "jailbroken_unseen"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spec = parse_spec(read_toml(asked.run / SPEC))
    study = spec.load()
    length = spec.request.sizes.answering.max_new_tokens
    suites = {suite.name: suite.prompts for suite in read_suites(asked.run / "prompts.jsonl")}
    rows = Run.read(asked.run).to_json()["arms"]
    arms = [BASELINE]
    for row in rows:
        if row["plan"] and row["kind"] != ArmKind.CONTROL.value:
            plan = read_plan(asked.run / "plans" / f"{row['plan']}.toml")
            if {ref.name for ref in plan.saes} <= {sae.name for sae in study.saes}:
                arms.append(Arm(row["name"], ArmKind(row["kind"]), plan))
    found: dict[str, dict[str, float]] = {}
    for name in asked.suites:
        prompts: list[Prompt] = list(suites[name][: asked.prompts])

        def plain(prompts: list[Prompt] = prompts) -> object:
            batch = pad_left([encode(study.lm, prompt.messages) for prompt in prompts], study.lm.pad_id)
            return study.lm.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=length,
            )

        plain()
        found[name] = {}
        for arm in arms:
            reference = seconds(plain)
            pairs = [(arm, prompt) for prompt in prompts]
            taken = seconds(lambda pairs=pairs: generate_arms(study.lm, study.saes, pairs, max_new_tokens=length))
            found[name][arm.name] = taken / reference
            print(f"{name}: {arm.name}: {taken / reference:.2f} of plain generate ({reference:.1f} s)", flush=True)
        reference = seconds(plain)
        pairs = [(arm, prompt) for prompt in prompts for arm in arms]
        together = seconds(lambda pairs=pairs: generate_arms(study.lm, study.saes, pairs, max_new_tokens=length))
        found[name]["all together, per arm"] = together / reference / len(arms)
        print(f"{name}: {len(arms)} arms together, per arm: {found[name]['all together, per arm']:.2f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
