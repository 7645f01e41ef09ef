"""The test of a study or an evaluation as a file: what was found, chosen, gated and matched, before anything is asked.

1. Finding and choosing happen once, on one machine. What they came to, `test.json`, is all that answering the test
   prompts needs beside the command itself: the arms, and what the summary will say of how they were chosen.
2. Shards on many machines answer the same arms, whatever the last bits of a calibration would be there; and a run that
   was interrupted in its test goes on there, without finding anything again.
3. `asked` is a hash of everything that the arms depend on. A file that another command made is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clampdown.documents import from_json, read_object
from clampdown.errors import PlanError, StoreError
from clampdown.evaluation.condition import NAME as CONDITION
from clampdown.evaluation.condition import StoredCondition
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm
from clampdown.steering.plan import parse_plan
from clampdown.store import to_jsonable, write_json
from clampdown.study.claims import Arms
from clampdown.study.sizes import Answering
from clampdown.types import ArmKind

SCHEMA, FILE = 1, "test.json"


@dataclass(frozen=True, slots=True)
class StoredArm:
    """An arm as plain values."""

    name: str
    kind: ArmKind
    plan: dict[str, Any] | None
    strength: float | None
    system_prompt: str | None
    group: str

    @classmethod
    def of(cls, arm: Arm) -> StoredArm:
        plan = arm.plan and {**arm.plan.model_dump(mode="json"), "schema_version": arm.plan.schema_version}
        return cls(arm.name, arm.kind, plan or None, arm.strength, arm.system_prompt, arm.group)

    def arm(self) -> Arm:
        """Raises `PlanError` for a plan that is none."""
        plan = None if self.plan is None else parse_plan(dict(self.plan), f"the plan of arm '{self.name}'")
        return Arm(self.name, self.kind, plan, self.strength, self.system_prompt, self.group)


@dataclass(frozen=True, slots=True)
class StoredAnswering:
    """An `Answering` as plain values: which engine writes the replies is said by the command each time."""

    per_suite: int
    kl_prompts: int
    batch_rows: int | None
    max_new_tokens: int
    control_prompts: int | None
    compared_prompts: int | None

    @classmethod
    def of(cls, found: Answering) -> StoredAnswering:
        return cls(**{each.name: getattr(found, each.name) for each in fields(cls)})

    def answering(self) -> Answering:
        return Answering(**{each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True, slots=True)
class FrozenTest:
    """What will be asked, of which arms. `likelihood` names the arms that answer multiple choice by likelihood too,
    `facts` are parts of the summary that no record changes, `gated` is the arm whose gate the summary tells of,
    `claimed` are the arms of both papers' claims, `timings` the seconds of the stages so far."""

    asked: str
    arms: tuple[Arm, ...]
    answering: Answering
    likelihood: tuple[str, ...] = ()
    conditions: tuple[Sae, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    gated: str | None = None
    claimed: Arms | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    def by_likelihood(self, arm: Arm) -> bool:
        """Whether this arm answers multiple choice by likelihood."""
        return arm.name in self.likelihood

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def write(self, directory: Path) -> FrozenTest:
        """Write `test.json`; returns the test as it lies there."""
        stored = {
            "asked": self.asked,
            "arms": [StoredArm.of(arm) for arm in self.arms],
            "answering": StoredAnswering.of(self.answering),
            "likelihood": self.likelihood,
            "conditions": conditions_of(self.conditions),
            "facts": self.facts,
            "gated": self.gated,
            "claimed": self.claimed,
            "timings": self.timings,
        }
        write_json(directory / FILE, {"schema": SCHEMA, "kind": "test", **stored})
        return self.read(directory)

    @classmethod
    def read(cls, directory: Path) -> FrozenTest:
        """Raises `StoreError` for a file that is no test."""
        path = directory / FILE
        raw = read_object(path)
        if raw.pop("kind", None) != "test" or raw.pop("schema", None) != SCHEMA:
            raise StoreError(f"{path} is not a test of schema {SCHEMA}")
        try:
            stored = from_json(_Stored, raw)
            arms = tuple(arm.arm() for arm in stored.arms)
        except (ValueError, PlanError) as error:
            raise StoreError(f"{path} is malformed: {error}") from error
        return cls(
            stored.asked,
            arms,
            stored.answering.answering(),
            stored.likelihood,
            tuple(one.sae() for one in stored.conditions),
            stored.facts,
            stored.gated,
            stored.claimed,
            stored.timings,
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """`test.json`, field by field."""

    asked: str
    arms: tuple[StoredArm, ...]
    answering: StoredAnswering
    likelihood: tuple[str, ...]
    conditions: tuple[StoredCondition, ...]
    facts: dict[str, Any]
    gated: str | None
    claimed: Arms | None
    timings: dict[str, float]


def frozen_test(directory: Path, asked: str) -> FrozenTest | None:
    """The test that a directory holds; None when it holds none. Raises `StoreError` for another command's."""
    if not (directory / FILE).exists():
        return None
    found = FrozenTest.read(directory)
    if found.asked != asked:
        raise StoreError(
            f"{directory / FILE} was made by another command (other model, SAE, prompts, sizes or settings)",
            hint="choose an empty --out directory, or repeat the exact command",
        )
    return found


def conditions_of(saes: tuple[Sae, ...]) -> tuple[StoredCondition, ...]:
    """Those SAEs that no checkpoint holds."""
    return tuple(StoredCondition.of(sae) for sae in saes if sae.name == CONDITION)


def jsonable(value: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they will be read back."""
    return dict(to_jsonable(value))
