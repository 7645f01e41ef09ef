"""The main job from Python: what a notebook needs, by short names (`import clampdown as cd`).

    lm, sae = cd.load("organism"), cd.load_sae("organism")
    data = cd.data("organism")                           # or cd.data(harmful="a.csv", benign="b.jsonl", ...)
    found = cd.find(lm, sae, data)
    plan = cd.clamp(lm, sae, found[0], "1.5p99", scope="prompt")
    with cd.steer(lm, plan) as s:
        replies = cd.generate(lm, ["Hi", "2 + 2?"])
    gated = plan.behind(cd.gate(lm, plan, data, budget=0.02))
    run = cd.evaluate(lm, [plan, gated], data, controls=20)

Every function takes loaded things or what names them: models and SAEs by name or directory, plans by their file. Long
calls show progress. Errors are those of `clampdown.errors`: they say what, where, and what to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from rich.console import Console

from clampdown.attacks import job as attacking
from clampdown.attacks.budget import Budget
from clampdown.attacks.table import ALL as ALL_ATTACKS
from clampdown.cards import Card
from clampdown.config import ORGANISM
from clampdown.discovery.finders import DEFAULT, run_finder
from clampdown.errors import PlanError, PromptSetError, StrengthError
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.interop.exports import exporting
from clampdown.interop.exports.exporting import Exported, Lossy
from clampdown.models.chat import encode
from clampdown.models.generation import Generation
from clampdown.models.generation import generate as generate_ids
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.placing import Placing
from clampdown.models.threads import choose_threads
from clampdown.results.run import Run
from clampdown.results.side_effects import MARGIN, SideEffects
from clampdown.saes import checkpoints
from clampdown.saes.sae import Sae, check_fits
from clampdown.scale import answering as scaled
from clampdown.scale import merging
from clampdown.scale.on_ray import answer_on_ray
from clampdown.scale.pool import PoolRequest
from clampdown.scale.shards import Shard
from clampdown.side_effects import job as side_effecting
from clampdown.steering import hooks
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.hooks import Steering
from clampdown.steering.ownership import owner_of
from clampdown.steering.plan import Edit, Plan, read_plan
from clampdown.steering.units import Strength, Unit, calibrate, resolve
from clampdown.store import write_feature_set
from clampdown.study import evaluate as evaluating
from clampdown.study import gate as gating
from clampdown.study.budgets import Budgets
from clampdown.study.card import make_card
from clampdown.study.groundwork import Groundwork
from clampdown.study.loading import saes_of
from clampdown.study.planned import run_sized
from clampdown.study.progress import Stages
from clampdown.study.prompts import Sources, StudyPrompts, embedded_prompts, prompts_from
from clampdown.study.run import StudyRequest
from clampdown.study.sizes import Sizes, size_named
from clampdown.study.study import Study, judge_for
from clampdown.types import FeatureScore, FeatureSet, Message, Prompt, PromptRole, Site, Split

__all__ = [
    "Budgets",
    "Placing",
    "add",
    "attack",
    "card",
    "clamp",
    "data",
    "evaluate",
    "evaluate_shard",
    "export",
    "find",
    "gate",
    "generate",
    "import_plan",
    "load",
    "load_sae",
    "merge",
    "plan",
    "run",
    "run_study",
    "side_effects",
    "steer",
    "tune",
]

Model = LanguageModel | str | Path
AnySae = Sae | str | Path
AnyPlan = Plan | str | Path
Feature = FeatureScore | int
Judged = NamedJudge | str | None
Asked = str | Sequence[Message] | Prompt
"""One prompt: a plain string (the user's turn), a conversation, or a suite's prompt."""

CARD_PROMPTS = 60
_SAES: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""SAEs that were loaded here, by site and revision: a plan that names one is steered with it, not loaded again."""


# ---- loading -----------------------------------------------------------------------------------------------------


def load(model: Model, placing: Placing | None = None) -> LanguageModel:
    """A model: 'organism', a directory, a .gguf file, or a hub id; `cd.Placing(device_map="auto")` and its like say
    where it goes, and in which precision. Raises `ModelError`."""
    if isinstance(model, LanguageModel):
        return model
    found = load_model(str(model), placing=placing)
    choose_threads(found)
    return found


def load_sae(sae: AnySae, site: str | None = None) -> Sae:
    """An SAE: 'organism', a directory, or 'release:id'. Raises `SaeError`."""
    found = (
        sae
        if isinstance(sae, Sae)
        else checkpoints.load_sae(str(sae), site=Site.parse(site) if site is not None else None)
    )
    _SAES[found.cfg.site.name, found.revision] = found
    return found


def data(
    name: str | None = None,
    *,
    harmful: Sources | None = None,
    jailbroken: Sources | None = None,
    multi_turn: Sources | None = None,
    borderline: Sources | None = None,
    benign: Sources | None = None,
    capability: Sources | None = None,
    mixed: Sources | None = None,
    hold_out: Sequence[str] | None = None,
    seed: int = 0,
) -> StudyPrompts:
    """Prompts by role: of the embedded corpus (`data("organism")`), or files and public sets for each role.

    Prompts without a split are dealt out by a hash of their text, the same way every time. Raises `PromptSetError`.
    """
    given: dict[str, Any] = {
        "harmful": harmful,
        "jailbroken": jailbroken,
        "multi_turn": multi_turn,
        "borderline": borderline,
        "benign": benign,
        "capability": capability,
        "mixed": mixed,
    }
    if name == ORGANISM and not any(given.values()):
        return embedded_prompts(seed)
    if not any(given.values()):
        raise PromptSetError(
            f"no prompts are called '{name}'" if name else "no prompts were given",
            hint="data('organism'), or data(harmful='a.csv', benign='b.csv')",
        )
    return prompts_from(**given, name=name or "files", hold_out=hold_out)


def plan(file: AnyPlan) -> Plan:
    """A plan from its file. Raises `PlanError`."""
    return file if isinstance(file, Plan) else read_plan(Path(file))


def run(directory: str | Path) -> Run:
    """A finished run's directory. Raises `StoreError`."""
    return Run.read(directory)


# ---- finding and making plans --------------------------------------------------------------------------------


def find(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    finder: str = DEFAULT,
    *,
    judge: Judged = None,
    size: str | Sizes = "small",
    seed: int = 0,
) -> FeatureSet:
    """Features that cause refusal, best first, by one finder (`clampdown discover --help` names them).

    Reads discovery prompts only. Raises `PromptSetError` for an unknown finder or missing prompts.
    """
    ground = _ground(_study(lm, sae, data, judge, seed), size)
    with ground.stages.stage(f"Finding: {finder}") as tick:
        return run_finder(finder, replace(ground.given, on_progress=tick))


def card(
    lm: Model, sae: AnySae, feature: Feature, data: StudyPrompts | None = None, sets: Sequence[FeatureSet] = ()
) -> Card:
    """What is known of one feature: what it promotes, where it fires, its strongest discovery prompts, its scores."""
    model, loaded = _pair(lm, sae)
    shown = (data or _own_prompts(model)).prompts(Split.DISCOVERY, CARD_PROMPTS)
    return make_card(model, loaded, _index(feature), shown, list(sets))


def clamp(
    lm: Model,
    sae: AnySae,
    feature: Feature | Sequence[Feature],
    strength: str | float,
    *,
    scope: str = "prompt",
    operator: str = "clamp",
    error_term: str = "keep",
    data: StudyPrompts | None = None,
    name: str | None = None,
) -> Plan:
    """A plan that clamps features: x' = x + (c - a_f(x)) W_dec[f] (2411.11296).

    `strength` is a raw activation (12), or a multiple of the feature's own largest ("1.5max") or p99 ("1.5p99")
    activation: that of a found feature's own prompts, else of `data`'s discovery prompts. Raises `StrengthError`,
    `FeatureIndexError` and `PlanError`.
    """
    model, loaded = _pair(lm, sae)
    features = list(feature) if isinstance(feature, Sequence) else [feature]
    indices = tuple(map(_index, features))
    asked = Strength.parse(str(strength))
    values = _values(model, loaded, features, asked, operator, data)
    edit = Edit(
        site=loaded.cfg.site.name,
        operator=operator,
        features=indices,
        strengths=values,
        scope=scope,
        error_term="drop" if error_term == "drop" else "keep",
    )
    loaded.select(indices)  # says at once that a feature does not exist
    return Plan.of(model, [loaded], [edit], name or f"{operator} {'+'.join(map(str, indices))} at {strength}, {scope}")


def add(lm: Model, sae: AnySae, feature: Feature | Sequence[Feature], strength: str | float, **options: Any) -> Plan:
    """A plan that adds features' decoder rows at constant amounts (2511.00029); options as for `clamp`."""
    return clamp(lm, sae, feature, strength, operator="add", **{"scope": "all", **options})


def gate(
    lm: Model,
    plan: AnyPlan,
    data: StudyPrompts,
    *,
    budget: float = 0.02,
    confidence: float = 0.95,
    kind: str = "probe",
    seed: int = 0,
) -> FittedGate:
    """A gate for the plan's harmful prompts: fitted on discovery prompts, and with `confidence` at most `budget` of
    benign conversations trigger it. `plan.behind(gate)` puts the plan behind it.

    Raises `NotEnoughDataError`, naming the number of prompts that would do.
    """
    model, found = load(lm), _plan(plan)
    request = gating.Request(Path("plan.toml"), kind, budget, confidence, seed=seed, data=data)
    return gating.gate_for(request, model, _saes([found], model), found, _stages())


# ---- steering ----------------------------------------------------------------------------------------------------


def steer(
    lm: Model, plans: AnyPlan | Sequence[AnyPlan | None] | None, **options: Any
) -> AbstractContextManager[Steering]:
    """Steer every call of the model inside the block: `with cd.steer(lm, plan) as s: ...; s.receipts()`.

    One plan for every row, or a list with one (or None) per row of the batch. The SAEs are those that the plans name.
    Raises `PlanMismatchError` for a plan that was made for another model or SAE.
    """
    model = load(lm)
    if plans is None or isinstance(plans, Plan | str | Path):
        found = None if plans is None else _plan(plans)
        every = [found] if found else []
    else:
        found = [None if one is None else _plan(one) for one in plans]
        every = [one for one in found if one is not None]
    return hooks.steer(model, found, _saes(every, model), **options)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered, in text and tokens, and whether it ended by itself."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    finished: bool

    def __str__(self) -> str:
        return self.text


def generate(lm: Model, prompts: Asked | Sequence[Asked], *, max_new_tokens: int = 64) -> list[Reply]:
    """Greedy replies to one prompt or several, steered by the enclosing `steer` block if there is one.

    Plain strings are user turns.
    """
    model = load(lm)
    asked = [_messages(one) for one in _several(prompts)]
    ids = [encode(model, messages) for messages in asked]
    owner = owner_of(id(model.layout.decoder))
    on_keep = owner.keep_rows if isinstance(owner, Steering) else None
    replies = generate_ids(model, ids, max_new_tokens=max_new_tokens, on_keep=on_keep)
    return [_reply(messages, reply) for messages, reply in zip(asked, replies, strict=True)]


# ---- measuring -----------------------------------------------------------------------------------------------


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
    directory, stages = _directory(out, "evaluate"), _stages()
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
    stages = _stages()
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
    found = [_plan(one) for one in given]
    assert request.data is not None
    judged = _judge(judge, model, request.data)
    return evaluating.prepared(request, found, model, _saes(found, model), judged, stages, out)


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
    model, found = load(lm), _plan(plan)
    named = suite if isinstance(suite, str) else None
    budget = Budget(queries, steps, seconds=seconds)
    request = attacking.Request(suite=named, attacks=tuple(attacks), budget=budget, limit=limit, seed=seed)
    given = attacking.prompts_of(request, model) if suite is None or isinstance(suite, str) else tuple(suite)[:limit]
    judged = judge if isinstance(judge, NamedJudge) else attacking.judge_of(judge, model)
    directory = _directory(out, "attack")
    return attacking.attack(found, model, _saes([found], model), judged, given, directory, request, _stages())


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
    given = [_plan(one) for one in ([plans] if isinstance(plans, Plan | str | Path) else plans)]
    request = side_effecting.Request(
        None if folder is None else Path(folder), tuple(kinds), limit=limit, margin=margin, seed=seed
    )
    judged = judge if isinstance(judge, NamedJudge) else side_effecting.judge_of(judge, model)
    directory = _directory(out, "side-effects")
    return side_effecting.side_effects(given, model, _saes(given, model), judged, directory, request, _stages())


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search ended with: the plan that refuses most within the budgets, and the run on test prompts."""

    plan: Plan
    run: Run


def tune(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    budgets: Budgets | None = None,
    *,
    features: FeatureSet | Path | None = None,
    trials: int | None = None,
    quick: bool = False,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Tuned:
    """Search features, operators, strengths, scopes and gates for the plan that refuses most within the budgets.

    Raises `NotEnoughDataError` when the prompts cannot prove the budgets, or no plan holds them.
    """
    from clampdown.study.tune import run as tuning
    from clampdown.study.tune.prompts import FULL, QUICK
    from clampdown.study.tune.space import Choices

    directory = _directory(out, "tune")
    scale = QUICK if quick else FULL
    scale = replace(scale, trials=trials or scale.trials)
    choices = Choices(_features_file(features, directory))
    request = tuning.Request(budgets or Budgets(), choices, scale)
    found = tuning.run_tune(_study(lm, sae, data, judge, seed), request, directory, _stages())
    return Tuned(read_plan(directory / "plan.toml"), found)


def run_study(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    *,
    size: str | Sizes = "small",
    methods: Sequence[str] | None = None,
    minutes: float | None = None,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Run:
    """The main job: find, choose, sweep, gate, control, read the test prompts once. The report lies in `out`."""
    sizes = size_named(size) if isinstance(size, str) else size
    request = StudyRequest(sizes, None if methods is None else tuple(methods))
    found, directory = _study(lm, sae, data, judge, seed), _directory(out, "study")
    ran = run_sized(found, request, directory, _stages(), minutes=minutes)
    ran.report()
    return ran


# ---- other tools ---------------------------------------------------------------------------------------------


def export(
    plan: AnyPlan,
    to: str,
    out: str | Path | None = None,
    *,
    lm: Model | None = None,
    lossy: bool = False,
    data: StudyPrompts | None = None,
    judge: str | None = None,
) -> Exported:
    """Write a plan in another tool's format (`clampdown export PLAN --to list` names them): exactly, or not at all.

    With `lossy` the nearest that the format can say is written, and measured against the plan on `data`'s prompts.
    Raises `ExportError`.
    """
    found = _plan(plan)
    model = load(lm or found.model.name)
    known = [_SAES[ref.site, ref.revision] for ref in found.saes if (ref.site, ref.revision) in _SAES]
    asked = Lossy(data, judge) if lossy else None
    return exporting.export(
        exporting.bind(found, model, known), to, None if out is None else Path(out), _stages(), asked
    )


def import_plan(
    source: str | Path,
    lm: Model | None = None,
    *,
    sae: str | None = None,
    strength: str | float | None = None,
    operator: str | None = None,
    scope: str = "all",
    name: str | None = None,
) -> Plan:
    """A plan of another tool's file, or of the address of a feature's page on Neuronpedia. Raises `SteeringFileError`.

    `strength` multiplies vectors; a feature's page needs one, and takes an `operator` (add by default).
    """
    asked = None if strength is None else str(strength)
    model = None if lm is None else load(lm)
    return exporting.import_plan(str(source), model, sae=sae, strength=asked, operator=operator, scope=scope, name=name)


# ---- what the functions above share ----------------------------------------------------------------------------


def _stages() -> Stages:
    return Stages(Console())


def _directory(out: str | Path | None, what: str) -> Path:
    return Path(out) if out is not None else Path(tempfile.mkdtemp(prefix=f"clampdown-{what}-"))


def _pair(lm: Model, sae: AnySae) -> tuple[LanguageModel, Sae]:
    model, loaded = load(lm), load_sae(sae)
    check_fits(loaded, model.d_model, model.n_layers)
    return model, loaded


def _study(lm: Model, sae: AnySae, data: StudyPrompts, judge: Judged, seed: int) -> Study:
    model, loaded = _pair(lm, sae)
    judged = _judge(judge, model, data)
    return Study(model, loaded.to(model.device), data, judged, judged.name, seed)


def _ground(found: Study, size: str | Sizes) -> Groundwork:
    return Groundwork(found, size_named(size) if isinstance(size, str) else size, _stages())


def _judge(judge: Judged, lm: LanguageModel, data: StudyPrompts) -> NamedJudge:
    return judge if isinstance(judge, NamedJudge) else judge_for(judge, lm, data)


def _own_prompts(lm: LanguageModel) -> StudyPrompts:
    if lm.name != ORGANISM:
        raise PromptSetError("which prompts?", hint="card(lm, sae, feature, data)")
    return embedded_prompts()


def _plan(found: Any) -> Plan:
    if not isinstance(found, Plan | str | Path):
        raise PlanError(f"{type(found).__name__} is no plan", hint="a Plan, or the path of a plan.toml")
    return plan(found)


def _saes(plans: Sequence[Plan], lm: LanguageModel) -> list[Sae]:
    """The SAEs that the plans name: those loaded here, else loaded now."""
    known = {ref.site: _SAES[ref.site, ref.revision] for one in plans for ref in one.saes
             if (ref.site, ref.revision) in _SAES}  # fmt: skip
    missing = [one for one in plans if any(ref.site not in known for ref in one.saes)]
    loaded = {sae.cfg.site.name: sae for sae in saes_of(missing, lm)}
    return list({**loaded, **known}.values())


def _index(feature: Feature) -> int:
    return feature.feature if isinstance(feature, FeatureScore) else feature


def _values(
    lm: LanguageModel,
    sae: Sae,
    features: Sequence[Feature],
    asked: Strength,
    operator: str,
    data: StudyPrompts | None,
) -> tuple[float, ...]:
    """Raw strengths: from what the features' finder saw, else from a pass over discovery prompts."""
    if asked.unit is Unit.RAW:
        return (asked.value,) * len(features)
    own = {Unit.MAX: "max_activation", Unit.P99: "p99_activation"}.get(asked.unit)
    scores: list[Mapping[str, float]] = [f.scores if isinstance(f, FeatureScore) else {} for f in features]
    if own and operator != "scale" and all(own in each for each in scores):
        return tuple(asked.value * each[own] for each in scores)
    if data is None and lm.name != ORGANISM:
        raise StrengthError(
            f"'{asked}' is relative to what features do on prompts, and there are none",
            hint="clamp(..., data=data), a feature that was found, or a raw strength such as 12",
        )
    roles = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BENIGN)
    shown = (data or embedded_prompts()).prompts(Split.DISCOVERY, CARD_PROMPTS, *roles)
    calibration = calibrate(lm, sae.cfg.site, sae.select([_index(f) for f in features]), shown)
    return resolve([asked], operator, calibration)


def _several(prompts: Asked | Sequence[Asked]) -> list[Asked]:
    """One prompt as a list of one; a list of messages is one conversation."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(one, Message) for one in listed) else listed  # type: ignore[list-item]


def _messages(asked: Asked) -> tuple[Message, ...]:
    if isinstance(asked, str):
        return (Message("user", asked),)
    return asked.messages if isinstance(asked, Prompt) else tuple(asked)


def _reply(messages: Sequence[Message], reply: Generation) -> Reply:
    return Reply(messages[-1].content, reply.text, reply.ids, reply.finished)


def _features_file(features: FeatureSet | Path | None, directory: Path) -> Path | None:
    if features is None or isinstance(features, Path):
        return features
    path = directory / "given-features.json"
    write_feature_set(path, features)
    return path
