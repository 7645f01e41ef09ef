"""Plans measured: beside the baseline and controls, in shards, under attack, and for what else they move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clampdown.attacks import job as attacking
from clampdown.attacks.budget import Budget
from clampdown.attacks.table import ALL as ALL_ATTACKS
from clampdown.effects import job as side_effecting
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.interactive.given import directory_for, judge_of, plan_of, progress, saes_for
from clampdown.interactive.loading import AnyPlan, Judged, Model, load
from clampdown.results.run import Run
from clampdown.results.side_effects import MARGIN, SideEffects
from clampdown.scale import answering as scaled
from clampdown.scale import merging
from clampdown.scale.on_ray import answer_on_ray
from clampdown.scale.pool import PoolRequest
from clampdown.scale.shards import Shard
from clampdown.steering.plan import Plan
from clampdown.study import evaluate as evaluating
from clampdown.study.progress import Stages
from clampdown.study.prompts import StudyPrompts
from clampdown.types import Prompt


def evaluate(
    lm: Model,
    plans: AnyPlan | Sequence[AnyPlan],
    data: StudyPrompts,
    *,
    judge: Judged = None,
    controls: int = 0,
    limit: int = 60,
    split: str = "test",
    batch_rows: int | None = None,
    ray: str | None = None,
    actors: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Run:
    """Measure plans beside the baseline on a split's prompts, at most `limit` of each suite; with `controls`, beside
    that many random features of the first plan's own size and the other controls.

    The run lies in `out` and goes on there when it was interrupted; by default in a temporary directory. With `ray`
    ("local", "auto" or an address) Ray's actors answer.
    """
    request = evaluating.Request(
        (), split=split, limit=limit, controls=controls > 0, n_random=controls, batch_rows=batch_rows, seed=seed,
        data=data,
    )  # fmt: skip
    directory, stages = directory_for(out, "evaluate"), progress()
    ready = _evaluation(lm, plans, request, judge, directory, stages)
    if ray is not None:
        evaluating.freeze(ready, directory)
        pool = PoolRequest(ray, actors)
        answer_on_ray(ready, ready.arms, ready.asked, ready.answering, directory, pool, stages)
    return evaluating.run_evaluate(ready, directory, request, stages)


def evaluate_shard(
    lm: Model,
    plans: AnyPlan | Sequence[AnyPlan],
    data: StudyPrompts,
    shard: str,
    out: str | Path,
    *,
    batch_rows: int,
    judge: Judged = None,
    limit: int = 60,
    split: str = "test",
    seed: int = 0,
) -> Path:
    """One part of an evaluation, INDEX/COUNT such as "0/16", into `out/shards`. When all are there, `merge(out)` joins
    them and `evaluate` with the same arguments and `out` finishes the run."""
    request = evaluating.Request((), split=split, limit=limit, batch_rows=batch_rows, seed=seed, data=data)
    stages = progress()
    ready = _evaluation(lm, plans, request, judge, Path(out), stages)
    return scaled.evaluate_shard(ready, Path(out), Shard.parse(shard), stages)


def merge(out: str | Path, shards: Sequence[str | Path] = ()) -> None:
    """Join shards (by default those under `out`) into `out`. Raises `ShardError` for one that is missing, doubled,
    unfinished or of another run."""
    merging.merge([Path(one) for one in shards] or merging.shards_under(Path(out)), Path(out))


def _evaluation(
    lm: Model,
    plans: AnyPlan | Sequence[AnyPlan],
    request: evaluating.Request,
    judge: Judged,
    out: Path,
    stages: Stages,
) -> evaluating.Evaluation:
    model = load(lm)
    given = [plans] if isinstance(plans, Plan | str | Path) else list(plans)
    found = [plan_of(one) for one in given]
    assert request.data is not None
    judged = judge_of(judge, model, request.data)
    return evaluating.prepared(request, found, model, saes_for(found, model), judged, stages, out)


def attack(
    lm: Model,
    plan: AnyPlan,
    suite: str | Sequence[Prompt] | None = None,
    *,
    queries: int = 200,
    steps: int = 200,
    limit: int = 24,
    attacks: Sequence[str] = ALL_ATTACKS,
    seconds: float | None = None,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Attack a plan, its edits without the gate, the bare model and a system prompt: success by arm, with intervals.

    `suite` is a name, NAME=FILE, a file, or prompts; by default the embedded corpus's harmful ones.
    """
    model, found = load(lm), plan_of(plan)
    named = suite if isinstance(suite, str) else None
    budget = Budget(queries, steps, seconds=seconds)
    request = attacking.Request(suite=named, attacks=tuple(attacks), budget=budget, limit=limit, seed=seed)
    given = attacking.prompts_of(request, model) if suite is None or isinstance(suite, str) else tuple(suite)[:limit]
    judged = judge if isinstance(judge, NamedJudge) else attacking.judge_of(judge, model)
    directory = directory_for(out, "attack")
    return attacking.attack(found, model, saes_for([found], model), judged, given, directory, request, progress())


def side_effects(
    lm: Model,
    plans: AnyPlan | Sequence[AnyPlan],
    folder: str | Path | None = None,
    *,
    kinds: Sequence[str] = (),
    limit: int = 40,
    margin: float = MARGIN,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> SideEffects:
    """What else plans moved beside the unsteered model: truthfulness, sycophancy, bias, persona, calibration, opinions.

    `folder` holds public sets by their authors' names; what is not there is listed as not measured.
    """
    model = load(lm)
    given = [plan_of(one) for one in ([plans] if isinstance(plans, Plan | str | Path) else plans)]
    request = side_effecting.Request(
        None if folder is None else Path(folder), tuple(kinds), limit=limit, margin=margin, seed=seed
    )
    judged = judge if isinstance(judge, NamedJudge) else side_effecting.judge_of(judge, model)
    directory = directory_for(out, "side-effects")
    return side_effecting.side_effects(given, model, saes_for(given, model), judged, directory, request, progress())
