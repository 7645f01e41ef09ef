"""One engine of the table, in a process of its own with the engine inside it: what differs from the reference, as JSON.

python run_table.py SETUP PLANS ROWS OUT [--rounds 3] [--two-passes] [--without-keys] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import setups

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
setups.environment()

from table import engine, read_rows, replies, rounds, wrong_receipts, wrong_replies  # noqa: E402  (environment first)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("setup")
    for name in ("plans", "rows", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--two-passes", action="store_true")
    parser.add_argument("--without-keys", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.without_keys:
        from clampdown_vllm import blocks

        blocks.done_to = lambda *_: None  # what a prefix cache that knows nothing of plans would do
    setup = dict(setups.SETUPS[options.setup], settings={"one_pass": not options.two_passes})
    if options.model:
        setup["model"] = options.model
    found = {"wrong": [], "receipts": [], "cached": 0, "one_pass": 0, "rows": 0}
    with engine(options.plans, **setup) as llm:
        for rows in rounds(read_rows(options.rows), options.rounds):
            outs = replies(llm, rows)
            found["wrong"] += wrong_replies(rows, outs)
            found["receipts"] += wrong_receipts(rows, outs)
            found["cached"] += sum(out.num_cached_tokens or 0 for out in outs)
            found["one_pass"] += sum(getattr(out, "steering", {}).get("one_pass", False) for out in outs)
            found["rows"] += len(rows)
        options.out.write_text(json.dumps(found))
    os._exit(0)  # without what torch and vLLM say about it on their way out


if __name__ == "__main__":
    main()
