"""`clampdown screen` on the embedded model: the kept generate, the dropped are in the report with their reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clampdown.saes.checkpoints import sae_revision
from clampdown.store import read_records, write_feature_set
from clampdown.types import FeatureScore, FeatureSet, Provenance
from tests.study.test_evaluate import command

SITE = "blocks.3.hook_resid_post"
FEATURES = (352, 249, 294, 183)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "found.json"
    provenance = Provenance("organism", "r", "organism", "h", "v", 0, {"sae_revision": sae_revision("organism")})
    scores = tuple(FeatureScore(f, {"score": 1.0 / i}) for i, f in enumerate(FEATURES, 1))
    write_feature_set(path, FeatureSet("by-hand", SITE, "score", scores, provenance))
    return path


@pytest.fixture(scope="module")
def run(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("screen") / "run"
    sizes = ("--top", 3, "--multiples", "0.5,1", "--keep", 2, "--screen-prompts", 6, "--limit", 3)
    assert command("screen", features, *sizes, "--out", out) == 0
    return out


def test_the_kept_generate_and_the_dropped_are_listed_with_a_reason(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    listed = summary["screening"]
    assert len(listed) == 3 * 2 * 2
    assert {feature for each in listed for feature in each["features"]} == set(FEATURES[:3])
    kept = [each["plan"] for each in listed if not each["dropped"]]
    assert [arm["name"] for arm in summary["arms"]] == ["baseline", *kept]
    assert all("of" in each["dropped"] for each in listed if each["plan"] not in kept)
    assert {record.arm for record in read_records(run / "records.jsonl")} == {"baseline", *kept}
    page = (run / "report.html").read_text()
    assert "Screened, and not generated" in page
    assert listed[-1]["dropped"] in page


def test_the_strongest_refusal_feature_is_kept(run: Path) -> None:
    listed = json.loads((run / "summary.json").read_text())["screening"]
    assert listed[0]["features"] == [352]
    assert listed[0]["gain"] > 1


def test_a_budget_that_nothing_meets_and_a_scope_that_no_prefill_shows(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("screen", features, "--scopes", "generated", "--out", tmp_path) == 2
    assert "a prefill generates nothing" in capsys.readouterr().err
    assert command("screen", features, "--kl-limit", "0", "--screen-prompts", 2, "--out", tmp_path) == 2
    assert "cost more than 0 nats" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(features.parent, other)
    text = (other / "found.json").read_text()
    (other / "found.json").write_text(text.replace(sae_revision("organism"), "another"))
    assert command("screen", other / "found.json", "--out", tmp_path) == 2
