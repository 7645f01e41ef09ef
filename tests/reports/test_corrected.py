"""Corrected refusal rates on the page: from labels of a run's own replies, beside the rates as judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from clampdown.evaluation.correction import OwnLabel, label_key
from clampdown.reports.page import build_page
from clampdown.results.run import Run
from clampdown.store import read_records
from clampdown.study.corrected import FILE, run_correction
from clampdown.types import Verdict


def test_the_page_shows_rates_corrected_by_labels(run_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run_dir, directory)
    assert "Corrected for the judge" not in build_page(Run.read(directory))
    records = {label_key(record): record for record in read_records(directory / "records.jsonl")}
    labels = tmp_path / "labels.jsonl"
    rows = [OwnLabel(*key, record.verdict is Verdict.REFUSED) for key, record in list(records.items())[::3]]
    labels.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    run_correction(directory, labels)
    page = build_page(Run.read(directory))
    assert "Corrected for the judge" in page and f"{len(rows)} labelled replies" in page
    (directory / FILE).write_text('{"kind": "corrected_refusals"}')
    assert "Corrected for the judge" not in build_page(Run.read(directory))
