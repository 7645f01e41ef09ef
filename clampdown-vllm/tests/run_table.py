"""One engine of the table, in a process of its own with the engine inside it: what differs from the reference, as JSON.

python run_table.py SETUP PLANS ROWS OUT [--rounds 2] [--two-passes] [--control 2] [--model DIR]
        [--runner v2] [--every 1] [--captured]


`--control N`: afterwards N rounds more, from an empty cache, without what the plugin adds to the keys of its blocks.
`--captured`: the op as where passes are captured: the same kernels whoever is seated, and one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import setups

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
setups.environment()
if "v2" in sys.argv:
    setups.interpret()

from table import engine, read_rows, replies, rounds, wrong_receipts, wrong_replies  # noqa: E402  (environment first)

from clampdown_vllm import blocks  # noqa: E402
from clampdown_vllm.worker import state  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("setup")
    for name in ("plans", "rows", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="of the rows, one in so many")
    parser.add_argument("--captured", action="store_true")
    parser.add_argument("--two-passes", action="store_true")
    parser.add_argument("--control", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--runner", choices=list(setups.RUNNERS), default="v1")
    options = parser.parse_args()
    setup = dict(setups.SETUPS[options.setup], settings={"one_pass": not options.two_passes})
    if options.model:
        setup["model"] = options.model
    if options.captured:
        state.captured = lambda _: True
    table = read_rows(options.rows)[:: options.every]
    found: dict[str, Any] = {"wrong": [], "receipts": [], "cached": 0, "one_pass": 0, "rows": 0, "control": []}
    with engine(options.plans, **setup) as llm:
        worker = llm.collective_rpc("clampdown_handshake")[0]
        assert worker["runner"] == setups.RUNNERS[options.runner]
        found["kernels"], found["sites"] = worker["kernels"], worker["sites"]
        for rows in rounds(table, options.rounds):
            outs = replies(llm, rows)
            found["wrong"] += wrong_replies(rows, outs)
            found["receipts"] += wrong_receipts(rows, outs)
            found["cached"] += sum(out.num_cached_tokens or 0 for out in outs)
            found["one_pass"] += sum(getattr(out, "steering", {}).get("one_pass", False) for out in outs)
            found["rows"] += len(rows)
        if options.control:
            blocks.done_to = lambda *_: None  # what a prefix cache that knows nothing of plans would do
            assert llm.reset_prefix_cache()
        for rows in rounds(table, options.control):
            found["control"] += wrong_replies(rows, replies(llm, rows))
        options.out.write_text(json.dumps(found))
    os._exit(0)  # without what torch and vLLM say about it on their way out


if __name__ == "__main__":
    main()
