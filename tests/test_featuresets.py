"""Feature sets: columns that other programs can read, files that survive a kill, and merges that keep every source."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from clampdown import store
from clampdown.errors import FeatureSetError, FeatureSetMismatchError, MissingPackageError
from clampdown.featuresets import check_made_for, merge
from clampdown.store import read_feature_set, write_feature_set
from clampdown.types import FeatureScore, FeatureSet, Provenance, ScoreColumns, ScoreSource

SITE = "blocks.1.hook_resid_post"
D_SAE = 6


def made(finder: str, scores: dict[str, list[float]], *kept: FeatureScore, **changes: object) -> FeatureSet:
    """A set with columns; `changes` go to its provenance."""
    extra = {"sae_revision": "abc", "n_prompts": "40"}
    provenance = replace(Provenance("m", "r", "sae", "prompts", "0.1", 3, extra), **changes)
    ranked_by = next(iter(scores), "none")
    return FeatureSet(finder, SITE, ranked_by, kept, provenance, {"pooling": "max"}, ScoreColumns(scores))


A = made(
    "contrast",
    {"d_prime": [0.5, math.nan, 3.0, -1.0, 0.0, 2.0], "rate": [0.1] * D_SAE},
    FeatureScore(2, {"d_prime": 3.0, "clamp": 7.5}, ("a prompt",), ("no",)),
    FeatureScore(5, {"d_prime": 2.0}),
)
B = made(
    "auroc",
    {"auroc": [0.5, 0.5, 0.9, 0.5, 0.5, 1.0], "d_prime": [9.0] * D_SAE},
    FeatureScore(5, {"auroc": 1.0}, (), ("yes",), ("of",)),
    FeatureScore(4, {"auroc": 0.5}),
    prompts_hash="others",
)


def test_columns_are_read_back_by_the_reference_library(tmp_path: Path) -> None:
    write_feature_set(tmp_path / "a.json", A)
    (file,) = tmp_path.glob("*.safetensors")
    theirs = load_file(file)
    assert theirs.keys() == {"d_prime", "rate"}
    np.testing.assert_array_equal(theirs["d_prime"], [0.5, math.nan, 3.0, -1.0, 0.0, 2.0])
    assert read_feature_set(tmp_path / "a.json") == A
    assert not read_feature_set(tmp_path / "a.json", with_columns=False).columns


def test_a_kill_between_the_two_files_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_feature_set(path, A)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write_feature_set(path, replace(A, columns=ScoreColumns({"d_prime": [1.0] * D_SAE})))
    assert read_feature_set(path) == A
    write_feature_set(path, B)
    write_feature_set(tmp_path / "a.b.json", A)
    write_feature_set(path, B)
    assert read_feature_set(path) == B
    assert read_feature_set(tmp_path / "a.b.json") == A
    assert len(list(tmp_path.iterdir())) == 4, "columns that nothing names are gone"


@pytest.mark.parametrize("fault", ["missing", "changed", "cut"])
def test_broken_columns_are_a_named_error(tmp_path: Path, fault: str) -> None:
    write_feature_set(tmp_path / "a.json", A)
    (file,) = tmp_path.glob("*.safetensors")
    if fault == "missing":
        file.unlink()
    else:
        raw = file.read_bytes()
        file.write_bytes(raw[:-8] if fault == "cut" else raw[:-1] + b"!")
    with pytest.raises(FeatureSetError, match="safetensors"):
        read_feature_set(tmp_path / "a.json")


def test_a_column_holds_what_is_known_of_every_feature() -> None:
    assert list(np.asarray(A.column("rate"))) == [0.1] * D_SAE
    np.testing.assert_array_equal(A.column("clamp"), [math.nan, math.nan, 7.5, *[math.nan] * 3])
    assert A.score_names == ("d_prime", "clamp", "rate")
    with pytest.raises(KeyError):
        A.column("nothing")


def test_merging_adds_columns_and_keeps_every_source() -> None:
    both = merge(A, B)
    assert both.ranking == (2, 5, 4)
    assert both.finder == "contrast + auroc"
    assert both.column("d_prime").tobytes() == A.column("d_prime").tobytes(), "the first set's score keeps its name"
    assert list(both.column("auroc/d_prime")) == [9.0] * D_SAE
    assert list(both.column("auroc")) == [0.5, 0.5, 0.9, 0.5, 0.5, 1.0]
    assert both.features[1].scores == {"d_prime": 2.0, "auroc": 1.0}
    assert both.features[1].promoted_tokens == ("yes",)
    assert both.source("auroc/d_prime") == ScoreSource("auroc", SITE, B.provenance, "max", 40)
    assert both.source("clamp").finder == "contrast"
    assert merge(both, B).score_names == both.score_names, "what is there already is not added again"


@pytest.mark.parametrize(
    "other",
    [
        replace(B, site="blocks.2.hook_resid_post"),
        replace(B, provenance=replace(B.provenance, extra={"sae_revision": "another"})),
        replace(B, provenance=replace(B.provenance, sae="another", extra={})),
        replace(B, columns=ScoreColumns({"auroc": [1.0]})),
    ],
    ids=["site", "hash", "name without hash", "width"],
)
def test_sets_about_different_saes_are_not_merged(other: FeatureSet) -> None:
    with pytest.raises(FeatureSetMismatchError):
        merge(A, other)


def test_a_set_is_known_by_its_saes_hash_and_not_by_its_name() -> None:
    check_made_for(A, sae="another name", revision="abc", site=SITE)
    with pytest.raises(FeatureSetMismatchError, match="another feature"):
        check_made_for(A, sae="sae", revision="changed", site=SITE)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        ScoreColumns({"a": [1.0], "b": [1.0, 2.0]})


def test_float32_and_strided_arrays_become_columns() -> None:
    values = np.arange(12, dtype=np.float64)
    found = ScoreColumns({"half": values.astype(np.float32)[:6], "strided": values[::2], "whole": values[:6]})
    assert list(found["half"]) == [0, 1, 2, 3, 4, 5]
    assert list(found["strided"]) == [0, 2, 4, 6, 8, 10]
    assert list(found["whole"]) == [0, 1, 2, 3, 4, 5]


def test_a_table_for_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = A.to_pandas()
    assert list(frame.columns) == ["rank", "d_prime", "clamp", "rate"]
    assert frame.loc[2].to_dict() == {"rank": 1, "d_prime": 3.0, "clamp": 7.5, "rate": 0.1}
    assert frame["rank"].isna().sum() == D_SAE - 2
    assert frame.attrs["provenance"]["extra"]["sae_revision"] == "abc"
    assert isinstance(frame, pandas.DataFrame)
    assert list(replace(A, columns=ScoreColumns()).to_pandas().index) == [2, 5]


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        A.to_pandas()
