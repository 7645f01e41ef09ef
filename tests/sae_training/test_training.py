"""`sae train` and `sae measure` as commands, on the embedded model: seconds, a handful of steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clampdown.cli import main as cli
from clampdown.errors import StoreError
from clampdown.models.loading import load_model
from clampdown.organism.suites import suites
from clampdown.sae_training import shards
from clampdown.sae_training.texts import read_texts, tokenized
from clampdown.saes.checkpoints import load_sae
from clampdown.types import Site, Split

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

SITE = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    prompts = [prompt for suite in suites(Split.DISCOVERY, 30) for prompt in suite.prompts]
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in prompt.messages]} for prompt in prompts]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["clampdown", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_train_then_measure(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, again = tmp_path / "sae", tmp_path / "again.json"
    options = ("--features", 128, "--k", 8, "--epochs", 4, "--batch", 256, "--tokens", 4000)
    assert run(monkeypatch, "sae", "train", "--text", chats, "--site", SITE, "--out", out, *options) == 0
    card = json.loads((out / "card.json").read_text())
    sae = load_sae(out)
    assert card["sae"]["revision"] == sae.revision
    assert (sae.cfg.d_sae, sae.cfg.model_name, sae.cfg.site.name) == (128, "organism", SITE)
    assert 0 < card["fit"]["fvu"] < 1
    texts = card["text"]["chats"]["texts"]
    assert texts <= card["residuals"]["dropped"]["sinks"] < 1.1 * texts
    assert 4000 <= card["text"]["chats"]["tokens"] < 4300
    assert f"{card['fit']['fvu']:.3f}" in (out / "README.md").read_text()
    assert run(monkeypatch, "sae", "measure", "--sae", out, "--text", chats, "--tokens", 1500, "--json", again) == 0
    assert json.loads(again.read_text())["fit"]["fvu"] == pytest.approx(card["fit"]["fvu"], abs=0.15)
    assert run(monkeypatch, "sae", "train", "--text", chats, "--site", SITE, "--out", out, *options) == 2


def test_a_collection_goes_on_where_it_stopped_and_knows_its_own(chats: Path, tmp_path: Path) -> None:
    lm = load_model("organism")
    rows = tuple(tokenized(lm, read_texts([chats]), 64))
    job = shards.Collection(lm, Site(3), rows)
    assert len(job.groups) > 2

    def die_at(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.collect(job, tmp_path, die_at)
    first = shards.shard_path(tmp_path, 0).stat().st_mtime_ns
    total = shards.collect(job, tmp_path)
    assert shards.shard_path(tmp_path, 0).stat().st_mtime_ns == first
    found = shards.read_collected(tmp_path, Site(3))
    assert len(found.residual) == total == sum(len(row.ids) for row in rows)
    texts = {tuple(ids) for ids in _texts(found)}
    assert texts == {row.ids for row in rows}
    with pytest.raises(StoreError):
        shards.collect(shards.Collection(lm, Site(2), rows), tmp_path)


def _texts(found: shards.Collected) -> list[list[int]]:
    cut: list[list[int]] = []
    for token, position in zip(found.token.tolist(), found.position.tolist(), strict=True):
        if position == 0:
            cut.append([])
        cut[-1].append(token)
    return cut


def test_a_fault_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"other": 1}\n')
    base = ("sae", "train", "--out", tmp_path / "o", "--site", SITE)
    assert run(monkeypatch, *base, "--text", tmp_path / "a.jsonl") == 2
    assert "line 2" in capsys.readouterr().err
    (tmp_path / "b.txt").write_text("a few words only")
    assert run(monkeypatch, *base, "--text", tmp_path / "b.txt") == 2
    elsewhere = ("--out", tmp_path / "p", "--site", "blocks.99.hook_resid_post")
    assert run(monkeypatch, "sae", "train", *elsewhere, "--text", tmp_path / "b.txt") == 2
    assert "Traceback" not in capsys.readouterr().err
