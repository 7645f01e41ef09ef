"""Replies and receipts of an engine beside the reference: what differs, row by row."""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference import TOKENS
from setups import COMMON

from clampdown.config import embedded_model

Row = Mapping[str, Any]
EOS = 5


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text())


@contextmanager
def engine(plans: Path, **setup: Any) -> Iterator[Any]:
    """An `LLM` with the plans, and nothing left of it afterwards."""
    from vllm import LLM

    settings = {"plans": str(plans), "scorers": {"length": "reference:length_score"}, **setup.pop("settings", {})}
    model = setup.pop("model", str(embedded_model("organism")))
    llm = LLM(model=model, additional_config={"clampdown": settings}, **{**COMMON, **setup})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def replies(llm: Any, rows: Sequence[Row]) -> list[Any]:
    """Every row in one call: plans of all kinds share batches."""
    from vllm import SamplingParams

    def params(row: Row) -> Any:
        extra = {"clampdown": row["plan"]} if row["plan"] else None
        return SamplingParams(temperature=0, max_tokens=TOKENS, extra_args=extra)

    prompts = [{"prompt_token_ids": row["prompt"]} for row in rows]
    return llm.generate(prompts, [params(row) for row in rows], use_tqdm=False)


def rounds(rows: Sequence[Row], n: int) -> Iterator[list[Row]]:
    """Each in another order, so that batches mix anew and later ones find a filled cache."""
    for seed in range(n):
        shuffled = list(rows)
        random.Random(seed).shuffle(shuffled)
        yield shuffled


def wrong_replies(rows: Sequence[Row], outs: Sequence[Any]) -> list[str]:
    found = []
    for row, out in zip(rows, outs, strict=True):
        ids = [token for token in out.outputs[0].token_ids if token != EOS]
        if ids != row["ids"]:
            found.append(f"{row['plan']}: {row['messages'][-1][1][:40]!r} cached {out.num_cached_tokens}")
    return found


EXACT = ("tokens_touched", "gate_fired", "branch", "turns_read", "worst_turn", "beyond_calibration")
CLOSE = ("edit_norm", "gate_score", "otherwise_score")


def wrong_receipts(rows: Sequence[Row], outs: Sequence[Any]) -> list[str]:
    found = []
    for row, out in zip(rows, outs, strict=True):
        if row["plan"] is None:
            found += ["an unsteered reply has a receipt"] if hasattr(out, "steering") else []
            continue
        given, wanted = out.steering, row["receipt"]
        bad = [k for k in EXACT if k in given and k != "branch" and given[k] != wanted[k]]
        bad += [k for k in CLOSE if k in given and not _close(given[k], wanted[k])]
        if wanted["branch"] is not None and given["branch"] != wanted["branch"]:
            bad.append("branch")
        found += [f"{row['plan']}: {[(k, given[k], wanted[k]) for k in bad]} {given}"] if bad else []
    return found


def _close(given: float | None, wanted: float | None) -> bool:
    if given is None or wanted is None:
        return given is wanted
    return math.isclose(given, wanted, rel_tol=2e-3, abs_tol=2e-3)
