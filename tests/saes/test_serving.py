"""Serving a few features: the same numbers as the whole SAE, a few kilobytes of memory, rows and columns read only."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clampdown.errors import CheckpointError, FeatureIndexError
from clampdown.saes.checkpoints import load_sae, open_sae
from tests.saes import files
from tests.saes.conftest import KINDS, random_sae

MEBI = 1 << 20


def memory(key: str) -> int:
    """A line of the process's own account of its memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def huge_sae(root: Path, d_in: int = 4096, d_sae: int = 65_536) -> Path:
    """A SAELens directory of 1 GiB in 16 bit, all of it a hole in the file: it takes no space and reads as zeros."""
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in], "threshold": [d_sae]}
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path = root / "sae_weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as handle:
        handle.truncate(8 + len(header) + end)
    cfg = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "metadata": {"sae_lens_version": "6.5.0"}}
    cfg["metadata"] |= {"hook_name": "blocks.25.hook_resid_post"}
    (root / "cfg.json").write_text(json.dumps(cfg))
    return root


def test_one_feature_of_a_65536_by_4096_sae_reads_its_rows_only(tmp_path: Path) -> None:
    path = huge_sae(tmp_path)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pytest.skip("this system does not let a process reset its memory peak")
    before = memory("VmRSS")
    sae = open_sae(path)
    view = sae.select([35_831])
    assert memory("VmHWM") - before < 128 * MEBI  # the whole is 1 GiB, 2 GiB in float32
    assert sae.bytes_held < MEBI
    assert view.directions.shape == (1, 4096)
    assert memory("VmRSS") - before < 64 * MEBI  # and no map of the file outlives the reading


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batchtopk"])
def test_an_opened_sae_gives_the_views_of_a_loaded_one(kind: str, tmp_path: Path, residual: Tensor) -> None:
    """Whatever was asked for before, in whatever order."""
    path = files.saelens(random_sae(kind), tmp_path)
    opened, loaded = open_sae(path), load_sae(path)
    assert (opened.cfg, opened.revision, opened.name) == (loaded.cfg, loaded.revision, loaded.name)
    for features in ([3, 17], [17], [39, 3, 0], [0, 17, 3, 39], [5]):
        view, expected = opened.select(features), loaded.select(features)
        assert view.features == expected.features
        assert torch.allclose(view.read(residual), expected.read(residual), atol=1e-6)
        assert torch.equal(view.directions, expected.directions)
    assert torch.equal(opened.whole().encode(residual), loaded.encode(residual))
    with pytest.raises(FeatureIndexError):
        opened.select([40])


def test_a_feature_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = open_sae(files.saelens(random_sae(), tmp_path))
    sae.select([3, 5])
    held = sae.bytes_held
    monkeypatch.setattr("clampdown.saes.checkpoints.load_feature_view", None)
    sae.select([5])
    assert sae.select([5, 3]).features == (5, 3)
    assert sae.bytes_held == held


def test_threads_may_share_an_opened_sae(tmp_path: Path, residual: Tensor) -> None:
    path = files.saelens(random_sae(), tmp_path)
    sae, full, wrong = open_sae(path), load_sae(path).encode(residual), []

    def work(start: int) -> None:
        for i in range(10):
            features = [start, start + i, start + 2 * i + 1]
            chosen = list(dict.fromkeys(features))
            if not torch.allclose(sae.select(chosen).read(residual), full[..., chosen], atol=1e-6):
                wrong.append(chosen)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 5, 10, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_that_change_under_an_opened_sae_are_noticed(tmp_path: Path) -> None:
    """The features already read stay what they were; a new one would come from another SAE."""
    sae = open_sae(files.saelens(random_sae(seed=0), tmp_path))
    first = sae.select([3]).directions.clone()
    files.saelens(random_sae(seed=1), tmp_path)
    assert torch.equal(sae.select([3]).directions, first)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        sae.select([4])
