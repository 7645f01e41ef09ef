"""The store on disk: what memory holds, whatever was killed, split or merged on the way."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clampdown.activations import files
from clampdown.activations.collect import collect, collect_to, merge_shards
from clampdown.activations.statistics import Moments
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Budget, plan_pass, read_batch, read_sae
from clampdown.errors import PromptSetError, StoreError
from tests.steering.conftest import random_sae, tiny_llama

SMALL = Budget(tokens_per_batch=60, codes_per_chunk=64 * 5)
POOLINGS = ("assistant_start", "max", "mean_active")


def plan(lm, prompts, **changes):
    settings = {"sae": random_sae(), "poolings": POOLINGS, "dense": ("assistant_start", "mean"), "budget": SMALL}
    settings |= changes
    reading = read_sae(settings["sae"], *settings["poolings"], dense=settings["dense"])
    return plan_pass(lm, [reading], prompts, settings["budget"])


@pytest.fixture(scope="module")
def job(lm, prompts):
    return plan(lm, prompts)


def contents(directory):
    """Every file of a finished pass, byte for byte."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The bytes of a pass in one go."""
    directory = tmp_path_factory.mktemp("whole")
    collect_to(job, directory)
    return contents(directory)


def test_disk_holds_what_memory_holds(job, tmp_path):
    stored, memory = collect_to(job, tmp_path), collect(job)
    assert stored.prompts == memory.prompts == job.prompts
    for name in POOLINGS:
        found, expected = stored.matrix(name), memory.matrix(name)
        assert (found != expected).nnz == 0
        assert found.nnz == expected.nnz > 0
        assert found.data.dtype == np.float32
        assert not found.data.flags.owndata, "mapped, not read"
    for name in ("assistant_start", "mean"):
        np.testing.assert_array_equal(stored.dense(name), memory.dense(name))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("when", ["first", "middle", "last", "finishing"])
def test_a_kill_at_any_moment_changes_no_byte(job, whole, tmp_path, monkeypatch, when):
    """The process dies in the middle of writing: what a kill leaves is a file under a temporary name."""
    dies_at = {"first": 0, "middle": len(job.batches) // 2, "last": len(job.batches) - 1, "finishing": None}[when]
    read = []

    def dying(job, number):
        read.append(number)
        if number == dies_at and len(read) == dies_at + 1:
            (tmp_path / "shards").mkdir(exist_ok=True)
            (tmp_path / "shards" / f".{number:06d}.safetensors.x1").write_bytes(b"half")
            raise KeyboardInterrupt
        return read_batch(job, number)

    monkeypatch.setattr("clampdown.activations.collect.read_batch", dying)
    if dies_at is None:
        monkeypatch.setattr(
            os,
            "replace",
            lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt) if "matrices" in str(b) else os.rename(a, b),
        )
    with pytest.raises(KeyboardInterrupt):
        collect_to(job, tmp_path)
    with pytest.raises(StoreError, match="not finished"):
        ActivationStore.open(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("clampdown.activations.collect.read_batch", lambda job, n: read.append(n) or read_batch(job, n))
    collect_to(job, tmp_path)
    assert contents(tmp_path) == whole
    done_once = set(range(len(job.batches))) - {dies_at}
    assert all(read.count(number) == 1 for number in done_once), "nothing is read twice"


def test_a_pass_belongs_to_its_weights(prompts, tmp_path):
    """Edited weights keep the model's name and revision: their numbers must not be answered from the old ones'."""
    lm = tiny_llama()
    collect_to(plan_pass(lm, [read_sae(random_sae())], prompts), tmp_path)
    with torch.no_grad():
        next(lm.model.parameters()).mul_(1.01)
    with pytest.raises(StoreError, match="holds another pass"):
        collect_to(plan_pass(lm, [read_sae(random_sae())], prompts), tmp_path)


def test_a_finished_pass_is_not_run_again(job, tmp_path, monkeypatch):
    collect_to(job, tmp_path)
    monkeypatch.setattr("clampdown.activations.collect.read_batch", lambda *_: pytest.fail("read again"))
    assert collect_to(job, tmp_path) is not None


@settings(max_examples=4)
@given(data=st.data())
def test_shards_merge_into_the_bytes_of_one_pass(job, whole, tmp_path_factory, data):
    n = len(job.batches)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    parts = [tmp_path_factory.mktemp("part") for _ in range(3)]
    for i, part in enumerate(parts):
        mine = [number for number, owner in enumerate(owners) if owner == i]
        done = collect_to(job, part, only=mine)
        assert (done is not None) == (len(mine) == n)
        if done is not None:
            assert contents(part) == whole
            return
    merged = tmp_path_factory.mktemp("merged")
    merge_shards(data.draw(st.permutations(parts)), merged, n)
    assert contents(merged) == whole


@settings(max_examples=20)
@given(data=st.data())
def test_moments_do_not_depend_on_blocks_or_order(job, stored, data):
    order = np.array(data.draw(st.permutations(range(len(job.prompts)))))
    cut = data.draw(st.integers(0, len(order)))
    for name in POOLINGS:
        values = stored.matrix(name)
        merged = Moments.of(values[order[cut:]]).merge(Moments.of(values[order[:cut]]))
        for part in ("mean", "m2", "max", "n_active"):
            np.testing.assert_array_equal(getattr(merged, part), getattr(stored.moments(name), part))


@pytest.fixture(scope="module")
def stored(job):
    return collect(job)


def test_blocks_of_rows_change_no_moment(stored, monkeypatch):
    expected = [stored.moments("max", rows) for rows in (None, "harmful")]
    monkeypatch.setattr("clampdown.activations.store.ENTRIES_PER_BLOCK", 7)
    for before, after in zip(expected, (stored.moments("max"), stored.moments("max", "harmful")), strict=True):
        assert before.count == after.count
        np.testing.assert_array_equal(before.m2, after.m2)


def test_rows_by_suite_by_mask_and_all(stored, prompts):
    harmful = np.array([prompt.suite == "harmful" for prompt in prompts])
    matrix = stored.matrix("max").toarray()
    np.testing.assert_array_equal(stored.matrix("max", "harmful").toarray(), matrix[harmful])
    np.testing.assert_array_equal(stored.matrix("max", ["harmful", "benign"]).toarray(), matrix)
    np.testing.assert_array_equal(stored.matrix("max", ~harmful).toarray(), matrix[~harmful])
    assert stored.moments("max", "harmful").count == harmful.sum()
    np.testing.assert_allclose(stored.moments("max", harmful).mean, matrix[harmful].mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        stored.residual_mean("mean", "harmful").mean, stored.dense("mean")[harmful].astype(float).mean(0)
    )
    with pytest.raises(PromptSetError, match="'charm'"):
        stored.matrix("max", "charm")
    with pytest.raises(PromptSetError, match="last"):
        stored.matrix("last")


CHANGES = {
    "model": lambda lm, prompts: plan(replace(lm, revision="r1"), prompts),
    "template": lambda lm, prompts: plan(other_template(), prompts),
    "sae": lambda lm, prompts: plan(lm, prompts, sae=replace(random_sae(), revision="s1")),
    "prompts": lambda lm, prompts: plan(lm, prompts[:-1]),
    "poolings": lambda lm, prompts: plan(lm, prompts, poolings=("max",)),
    "dense": lambda lm, prompts: plan(lm, prompts, dense=("mean",)),
    "budget": lambda lm, prompts: plan(lm, prompts, budget=Budget(50)),
}


def other_template():
    lm = tiny_llama()
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<{{ m.role }}>", "<{{ m.role }}>w0 w0 w0 ")
    return lm


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_number_changes_the_key(lm, prompts, job, tmp_path, change):
    files.claim(job, tmp_path)
    files.claim(plan(lm, prompts), tmp_path)
    with pytest.raises(StoreError, match="another pass"):
        collect_to(CHANGES[change](lm, prompts), tmp_path)


def test_damage_is_named(job, tmp_path):
    with pytest.raises(StoreError):
        ActivationStore.open(tmp_path)
    collect_to(job, tmp_path, only=[0])
    path = files.shard_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=path.name):
        collect_to(job, tmp_path)
    with pytest.raises(StoreError, match=path.name):
        merge_shards([tmp_path], tmp_path / "merged", len(job.batches))
    collect_to(job, tmp_path / "part", only=[0])
    with pytest.raises(StoreError, match="batch 1 of"):
        merge_shards([tmp_path / "part"], tmp_path / "incomplete", len(job.batches))
