"""What a plan costs and why, as one JSON file: measured by a command, rendered by `reports` without a model.

All of it is about benign text, with the plan's gate held open: what the edits do where they act. How often the gate
keeps them from acting is in `gate_fired`. Norms are relative: ||h' - h|| / ||h|| over real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clampdown.store import SCHEMA, to_jsonable, write_json
from clampdown.types import Interval, Provenance


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Means over the predicted tokens of the unsteered model's replies. `kl` is KL(base || steered) in nats, `nll`
    the negative log-likelihood of the replies, before and after."""

    n_tokens: int
    n_texts: int
    kl: float
    top1_agreement: Interval
    nll_before: float
    nll_after: float


@dataclass(frozen=True, slots=True)
class PlaceCost:
    """The cost at the i-th predicted token of a reply, i from 1."""

    place: int
    kl: float
    top1_agreement: float
    n: int


@dataclass(frozen=True, slots=True)
class MovedToken:
    """A prediction that moved: what each model would say after `context`, and the token that the text has there
    (empty: the end of the turn)."""

    suite: str
    prompt_id: str
    place: int
    context: str
    text: str
    before: str
    after: str
    kl: float


@dataclass(frozen=True, slots=True)
class SiteEdit:
    """How large the edit at one site is: mean over the tokens it touches, and their share of all."""

    site: str
    relative_norm: float | None
    touched: float


@dataclass(frozen=True, slots=True)
class Travel:
    """The difference at a layer's output. `alignment` is its mean cosine with the edit itself, over tokens that the
    first edit touched: 1 is carried on unchanged, 0 has become something else."""

    site: str
    relative_norm: float
    alignment: float | None


@dataclass(frozen=True, slots=True)
class FeatureShift:
    """One SAE feature on the same tokens without and with the edit: mean activation and share of tokens where it is
    live. `cosine` is its decoder row's largest with a steered feature's; None for an SAE none of whose features is."""

    site: str
    feature: int
    steered: bool
    mean_before: float
    mean_after: float
    live_before: float
    live_after: float
    cosine: float | None
    promotes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteFeatures:
    """How much of an SAE's code changed: `turned_on` and `turned_off` count features per token, the steered ones left
    out; `live` is the mean number of live features before."""

    site: str
    live: float
    turned_on: float
    turned_off: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Damage:
    """The cost of one push of the plan's size (or of the plan). `kind` is plan, feature, direction or pass-through;
    `accuracy` by suite, answered by likelihood."""

    name: str
    kind: str
    kl: float | None
    top1_agreement: float | None
    edit_norm: float | None
    accuracy: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class Joint:
    """Two parts of the plan together against each alone: `kl` of the pair, `sum_kl` of the two added."""

    first: str
    second: str
    kl: float | None
    sum_kl: float | None


@dataclass(frozen=True, slots=True)
class Answered:
    """What an arm answers when it writes: right answers by suite, and how many benign prompts it refuses or breaks on.

    Likelihoods of given answers survive where written ones are lost, so both are measured."""

    arm: str
    right: Mapping[str, Interval]
    refused: Interval
    broken: Interval


@dataclass(frozen=True, slots=True)
class Failures:
    """Whose fault it was, by suite: counts of the plan's replies that did not do what was right.

    Where refusing is right (`harmful`): `gate` is not refused with the gate shut, `edit` not refused although it acted,
    `broken` a broken reply where it acted. Elsewhere: `gate` is refused or broken because the first branch acted,
    `edit` although the second one did, `model` by the model itself. `disputed` counts replies that a second judge reads
    otherwise, right or wrong: as many of the others may be the judge's."""

    suite: str
    harmful: bool
    n: int
    right: int
    gate: int
    edit: int
    broken: int
    model: int
    disputed: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that `clampdown explain` measured. `baseline_accuracy` is the unsteered model's; `notes` say what
    could not be measured, and why. `answered` and `failures` are about replies that were written; empty: not asked."""

    plan: str
    plan_digest: str
    edits: tuple[str, ...]
    provenance: Provenance
    cost: TokenCost
    gate_fired: Interval | None
    places: tuple[PlaceCost, ...]
    moved: tuple[MovedToken, ...]
    site_edits: tuple[SiteEdit, ...]
    travel: tuple[Travel, ...]
    features: tuple[FeatureShift, ...]
    codes: tuple[SiteFeatures, ...]
    baseline_accuracy: Mapping[str, Interval]
    damage: tuple[Damage, ...]
    joints: tuple[Joint, ...]
    notes: tuple[str, ...]
    answered: tuple[Answered, ...] = ()
    failures: tuple[Failures, ...] = ()

    @property
    def own_damage(self) -> Damage:
        return next(row for row in self.damage if row.kind == "plan")

    def controls(self, kind: str) -> tuple[Damage, ...]:
        return tuple(row for row in self.damage if row.kind == kind)


def write_explanation(path: Path, found: Explanation) -> None:
    write_json(path, {"schema": SCHEMA, "kind": "explanation", **to_jsonable(found)})
