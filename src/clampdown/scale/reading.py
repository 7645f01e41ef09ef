"""A shard of discovery: some of the batches of the pass over the prompts, which is what grows with prompts and layers.

What finders make of the pass (statistics, gradients, clamps of the finalists) is done once, where shards are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clampdown.activations.collect import read_into
from clampdown.activations.stream import Pass
from clampdown.scale.shards import Shard, ShardFile, begin
from clampdown.store import content_hash
from clampdown.study.discover import Request, pass_of
from clampdown.study.progress import Stages

KIND = "pass"


def discover_shard(
    model: str, sae: str, request: Request, out: Path, shard: Shard, stages: Stages, command: Sequence[str] = ()
) -> Path:
    """One shard of the pass, into a directory of its own under `out`."""
    with stages.stage("Loading"):
        job = pass_of(model, sae, request)
    directory = shard.directory(out)
    read_shard(job, directory, shard, stages, command)
    return directory


def read_shard(job: Pass, directory: Path, shard: Shard, stages: Stages, command: Sequence[str] = ()) -> None:
    """Run one shard's batches of a pass. An interrupted shard goes on."""
    file = ShardFile(KIND, shard, job.key, {"batches": len(job.batches)}, tuple(command))
    begin(directory, file)
    with stages.stage(f"Reading shard {shard}") as tick:
        read_into(job, pass_directory(directory, job.key), tick, only=shard.of(len(job.batches)))
    replace(file, finished=True).write(directory)


def pass_directory(directory: Path, key: object) -> Path:
    """Where a run keeps a pass (`study.discover.run_pass` looks there)."""
    return directory / "activations" / content_hash(key)
