"""The plans that a server offers, and which one a request means.

A plan is looked up in a table by its name; nothing that a client sends is ever opened as a file. `NAME` is the model
without steering and `NAME:plan` the model under a plan (`base` and `base:plan` mean the same on every server). The
field `steering` goes before the model's name: a plan, "off", or an edit of the client's own within the server's bounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from clampdown.errors import PlanError, RequestError
from clampdown.serving.schemas import InlineEdit
from clampdown.steering.plan import Plan

BASE, OFF, INLINE = "base", "off", "inline"
_UNSPEAKABLE = re.compile(r"[^a-z0-9._+-]+")


@runtime_checkable
class MakesPlans(Protocol):
    """Turns an edit that a client sent into a plan. Raises `PlanError`, `StrengthError` and kin."""

    def __call__(self, edit: InlineEdit, gate: Plan | None) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What steers a request: a plan under the name that it has in metrics and logs, or None for no steering."""

    name: str
    plan: Plan | None


def slug(name: str) -> str:
    """A plan's name as part of a model's id: "clamp 352 prompt x2" is "clamp-352-prompt-x2"."""
    return _UNSPEAKABLE.sub("-", name.casefold()).strip("-") or "plan"


@dataclass
class PlanTable:
    """Plans by name. `inline` is None on a server that takes no edits from clients; without `allow_base` every request
    needs a plan."""

    model: str
    inline: MakesPlans | None = None
    allow_base: bool = True
    _plans: dict[str, Plan] = field(default_factory=dict)

    def add(self, plan: Plan, name: str | None = None) -> str:
        """Offer a plan; returns its name here. Raises `PlanError` for a name that means something else."""
        key = slug(name or plan.name)
        if key in (BASE, OFF, INLINE):
            raise PlanError(f"a plan cannot be called '{key}' here: that word has a meaning", hint="rename the plan")
        if key in self._plans and self._plans[key].digest != plan.digest:
            raise PlanError(f"two plans are called '{key}'", hint="rename one: names are compared as model ids")
        self._plans[key] = plan
        return key

    def __iter__(self) -> Iterator[tuple[str, Plan]]:
        return iter(list(self._plans.items()))

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    @property
    def ids(self) -> tuple[str, ...]:
        """Every model id that is listed."""
        base = (self.model,) if self.allow_base else ()
        return base + tuple(f"{self.model}:{name}" for name in self._plans)

    def choose(self, model: str, steering: str | InlineEdit | None) -> Choice:
        """What a request means. Raises `RequestError`: 404 for a model or a plan that is not here, 403 for what this
        server does not allow."""
        named = self._of_model(model)
        if isinstance(steering, InlineEdit):
            return self._edited(steering)
        if steering is not None:
            named = self._of_field(steering)
        if named.plan is None and not self.allow_base:
            raise RequestError(
                f"this server answers with a plan only: {self._known()}", status=403, code="steering_required"
            )
        return named

    def of_id(self, model: str) -> Choice:
        """The plan behind a listed id. Raises `RequestError`."""
        return self._of_model(model)

    def _of_model(self, model: str) -> Choice:
        for base in (self.model, BASE):
            if model == base:
                return Choice(BASE, None)
            if model.startswith(f"{base}:") and (name := model[len(base) + 1 :]) in self._plans:
                return Choice(name, self._plans[name])
        raise RequestError(
            f"the model {_quoted(model)} does not exist here; there are: {', '.join(self.ids)}",
            status=404,
            code="model_not_found",
            param="model",
        )

    def _of_field(self, name: str) -> Choice:
        if name == OFF:
            return Choice(BASE, None)
        return Choice(name, self._named(name, "steering"))

    def _named(self, name: str, param: str) -> Plan:
        if name not in self._plans:
            raise RequestError(
                f"there is no plan {_quoted(name)} here; {self._known()}",
                status=404,
                code="plan_not_found",
                param=param,
            )
        return self._plans[name]

    def _edited(self, edit: InlineEdit) -> Choice:
        if self.inline is None:
            raise RequestError(
                "this server takes no edits in requests, only its own plans",
                status=403,
                code="inline_steering_disabled",
                param="steering",
            )
        gate = self._named(edit.gate, "steering.gate") if edit.gate else None
        return Choice(INLINE, self.inline(edit, gate))

    def _known(self) -> str:
        return f"plans: {', '.join(self._plans)}" if self._plans else "it has no plans"


def described(plan: Plan) -> Mapping[str, object]:
    """What /v1/models says of a plan beside its name."""
    from clampdown.steering.units import in_words

    return {
        "plan": plan.name,
        "digest": plan.digest,
        "edits": [in_words(edit) for edit in plan.edits],
        "gates": [
            {
                "kind": gate.kind,
                "threshold": gate.threshold,
                "guarantee": gate.guarantee and gate.guarantee.model_dump(),
            }
            for gate in plan.gates
        ],
    }


def _quoted(name: str) -> str:
    """A client's word in our message: short."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
