"""Listing, showing and comparing from files: filters, sorts over all features, and two SAEs of one site."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clampdown.cards import write_card
from clampdown.cli import main as cli
from clampdown.errors import FeatureSetError, FeatureSetMismatchError
from clampdown.saes.checkpoints import load_sae
from clampdown.store import write_feature_set
from clampdown.study.features import compare, list_features, parse_condition, read_sets
from clampdown.types import FeatureScore, FeatureSet, Provenance, ScoreColumns
from tests.reports.test_card_page import CARD

NAN = float("nan")


def saved(path: Path, finder: str, sae: str = "organism", revision: str = "r", **columns: list[float]) -> Path:
    """A feature set whose best feature by its first column is the one it keeps."""
    name, values = next(iter(columns.items()))
    best = max((v, i) for i, v in enumerate(values) if v == v)[1]
    provenance = Provenance("organism", "m", sae, "h", "0", 0, {"sae_revision": revision})
    kept = (FeatureScore(best, {name: values[best]}, (), (" no",)),)
    found = FeatureSet(finder, "blocks.3.hook_resid_post", name, kept, provenance, {}, ScoreColumns(columns))
    write_feature_set(path, found)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    saved(tmp_path / "a.json", "contrast", d_prime=[0.5, 3.0, NAN, 2.0, 1.0], rate=[0.0, 0.5, 1.0, 0.2, 0.9])
    saved(tmp_path / "b.json", "auroc", auroc=[0.5, 0.6, 0.9, 0.7, 0.8])
    return tmp_path


def test_kept_features_by_default_and_all_of_them_when_sorted(directory: Path) -> None:
    assert list_features(directory, None, ()).ranking == (1, 2)
    assert list_features(directory, "d_prime", ()).ranking == (1, 3, 4, 0), "feature 2 has no d_prime"
    assert list_features(directory, "auroc", (), ascending=True).ranking == (0, 1, 3, 4, 2)
    found = list_features(directory, "d_prime", [parse_condition("rate >= 0.2"), parse_condition("auroc<0.8")])
    assert found.ranking == (1, 3)
    assert found.features[0].scores == {"d_prime": 3.0, "rate": 0.5, "auroc": 0.6}


@pytest.mark.parametrize("text", ["d_prime", "d_prime=3", "d_prime>=x", ">=3", "d_prime>=nan", "a>=1>=2"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(FeatureSetError, match="not a condition"):
        parse_condition(text)


def test_unknown_scores_and_empty_places(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureSetError, match="one of: d_prime"):
        list_features(directory, "nothing", ())
    with pytest.raises(FeatureSetError, match="no feature sets"):
        read_sets(tmp_path / "empty")


def test_comparing_two_saes_goes_by_their_decoder_rows(tmp_path: Path) -> None:
    """x4 against itself under another index would be exact; x4 against x8 finds some of its features again."""
    small, large = load_sae("organism"), load_sae("organism:x8")
    values = [float(i) for i in range(1024)]
    a = saved(tmp_path / "a.json", "one", "organism", small.revision, x=values[:512])
    b = saved(tmp_path / "b.json", "two", "organism:x8", large.revision, x=values)
    found = compare(a, b, ["x"])
    assert 0 < found.n < 512 and found.without_counterpart == 512 - found.n
    unit = [each.W_dec / each.W_dec.norm(dim=1, keepdim=True) for each in (small, large)]
    for mover in found.movers:
        cosine = float(unit[0][mover.feature] @ unit[1][mover.counterpart])
        assert cosine == pytest.approx(float((unit[0][mover.feature] @ unit[1].T).max())) and cosine >= 0.7
    changed = saved(tmp_path / "c.json", "two", "organism:x8", "another revision", x=values)
    with pytest.raises(FeatureSetMismatchError):
        compare(a, changed, ["x"])


def test_a_card_is_shown_again_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(tmp_path / "card.json", CARD)
    page = tmp_path / "card.html"
    monkeypatch.setattr(sys, "argv", ["clampdown", "features", "show", f"{tmp_path}/card.json", "--html", str(page)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "Feature 7" in capsys.readouterr().out and "Feature 7" in page.read_text()
