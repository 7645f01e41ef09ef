"""`LLM` with plans, as in docs/vllm.md, its engine in a process of its own.

python run_offline.py PLANS ROWS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import setups

setups.environment()

from reference import TOKENS  # noqa: E402  (the environment goes first)
from table import engine, read_rows  # noqa: E402

NAMES = ("clamp-352", "two-sided", "last-user")


def main(plans: Path, rows: Path, out: Path) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    chosen = [row for row in read_rows(rows) if row["plan"] in NAMES][::5]
    answers, refused = [], ""
    with engine(plans, enforce_eager=True) as llm:
        text = llm.get_tokenizer().decode
        for row in chosen:
            asked = SamplingParams(temperature=0, max_tokens=TOKENS, extra_args={"clampdown": row["plan"]})
            messages = [{"role": role, "content": content} for role, content in row["messages"]]
            outs = [*llm.generate({"prompt_token_ids": row["prompt"]}, asked, use_tqdm=False)]
            outs += llm.chat(messages, asked, use_tqdm=False)
            outs += llm.generate({"prompt": text(row["prompt"])}, asked, use_tqdm=False)
            answers.append([row, [[o.outputs[0].text, o.steering] for o in outs]])
        (plain,) = llm.generate("Hello.", SamplingParams(max_tokens=4), use_tqdm=False)
        try:
            llm.generate("Hello.", SamplingParams(extra_args={"clampdown": "no-such-plan"}), use_tqdm=False)
        except VLLMValidationError as error:
            refused = str(error)
    found = {"answers": answers, "unsteered": getattr(plain, "steering", None), "refused": refused}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
