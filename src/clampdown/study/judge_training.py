"""`clampdown judge train`: labelled replies in, a judge's file and its card out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from clampdown.config import CODE_VERSION
from clampdown.errors import JudgeError
from clampdown.evaluation.agreement import Labelled, Question, agreement, read_labelled
from clampdown.evaluation.judges import training
from clampdown.evaluation.judges.learned import write_reader
from clampdown.store import content_hash
from clampdown.study.progress import Stages
from clampdown.types import Interval


def run_training(files: Sequence[Path], out: Path, stages: Stages) -> RenderableType:
    """Train, write, and say how well the judge did on replies that it had not seen. Raises `JudgeError`,
    `PromptSetError`, `NotEnoughDataError`."""
    if not files:
        raise JudgeError("nothing to learn from", hint="--labels FILE.csv (prompt, completion, final_label)")
    replies = [reply for path in files for reply in read_labelled(path)]
    labelled = [training.example_of(reply) for reply in replies]
    with stages.stage("Training") as tick:
        trained = training.train(labelled, _card(files, replies), tick)
    scores = _scores(replies, trained.held_out)
    reader = trained.reader
    card = {**reader.card, "held_out": json.dumps({name: _row(value) for name, value in scores.items()})}
    write_reader(out, type(reader).of(reader.names, reader.weights, card))
    lines = [Text(f"{name}: {value:.3f} on replies not trained on, n = {value.n}") for name, value in scores.items()]
    size = out.stat().st_size / 1e6
    return Group(*lines, Text(f"written: {out} ({len(reader.names)} features, {size:.1f} MB)"))


def _card(files: Sequence[Path], replies: Sequence[Labelled]) -> dict[str, str]:
    counts = Counter(reply.source for reply in replies)
    hashes = {
        path.name: content_hash([(r.prompt.text, r.reply, r.word) for r in read_labelled(path)]) for path in files
    }
    return {
        "data": json.dumps({name: {"replies": counts[Path(name).stem], "hash": hashes[name]} for name in hashes}),
        "code": CODE_VERSION,
    }


def _scores(replies: Sequence[Labelled], outside: training.HeldOut) -> dict[str, Interval]:
    judgements = training.judgements_outside(replies, outside)
    found = {}
    for question in Question:
        for source in dict.fromkeys(reply.source for reply in replies):
            rows = [i for i, reply in enumerate(replies) if reply.source == source]
            one = agreement([replies[i] for i in rows], [judgements[i] for i in rows], question)
            if one.kappa.value is not None:
                found[f"kappa, {question.value}, {source}"] = one.kappa
    return found


def _row(value: Interval) -> dict[str, float | int | None]:
    return {"kappa": value.value, "low": value.low, "high": value.high, "n": value.n}
