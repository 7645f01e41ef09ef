"""Plans of every kind for the embedded model, and replies to single requests that the engine's must equal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.serving.engine import Engine
from clampdown.serving.requests import Done, Piece, Request, Sampling
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, ModelRef, Plan, SaeRef
from clampdown.types import Receipt, Split


@cache
def model() -> LanguageModel:
    return load_model("organism")


@cache
def saes() -> tuple[Sae, Sae]:
    """Two SAEs of one site: their plans may not share a reader."""
    return load_sae("organism:x4"), load_sae("organism:x8")


@cache
def prompts(n: int = 3) -> list[tuple[int, ...]]:
    """Prompts of several suites and lengths."""
    found = [prompt for suite in suites(Split.VALIDATION, n) for prompt in suite.prompts]
    return [tuple(encode(model(), prompt.messages)) for prompt in found]


def edit(operator: str, strength: float, scope: str = "all", feature: int = 7, **more: object) -> Edit:
    site = saes()[0].cfg.site.name
    return Edit(site=site, operator=operator, features=(feature,), strengths=(strength,), scope=scope, **more)  # type: ignore[arg-type]


def dense(operator: str, strength: float, scope: str = "all", vector: str = "v") -> Edit:
    return Edit(site="blocks.2.hook_resid_post", operator=operator, vector=vector, strengths=(strength,), scope=scope)


def gate(threshold: float, feature: int = 3, **more: float) -> Gate:
    features = tuple(range(feature, saes()[0].cfg.d_sae, 8))
    return Gate(
        site=saes()[0].cfg.site.name,
        features=features,
        weights=(1.0,) * len(features),
        threshold=threshold,
        poolings=("max",) * len(features),
        **more,  # type: ignore[arg-type]
    )


def plan(name: str, *edits: Edit, sae: int = 0, **more: object) -> Plan:
    used = saes()[sae]
    refs = (SaeRef(site=used.cfg.site.name, name=used.name, revision=used.revision),)
    draw = torch.Generator().manual_seed(5)
    vectors = {"v": tuple(torch.randn(model().d_model, generator=draw).tolist())}
    rows = torch.linalg.qr(torch.tensor([*vectors.values(), *torch.eye(model().d_model)[:3].tolist()]).T)[0].T
    vectors |= dict(zip(("w", "e0", "e1"), map(tuple, rows[1:].tolist()), strict=True))  # all at right angles
    ref = ModelRef(name=model().name, revision=model().revision)
    return Plan(name=name, model=ref, saes=refs, edits=edits, vectors=vectors, **more)  # type: ignore[arg-type]


@cache
def plans() -> tuple[Plan | None, ...]:
    """None, every scope, sparse and dense, one edit and several, ungated, gated, two-sided, and of another SAE."""
    return (
        None,
        plan("all", edit("clamp", 120.0)),
        plan("prompt", edit("clamp", 240.0, "prompt", 11)),
        plan("generated", edit("floor", 40.0, "generated", 9)),
        plan("assistant", edit("add", 30.0, "assistant", 13), edit("scale", -3.0, "all", 5)),
        plan("dense", dense("add_direction", 12.0), dense("ablate_direction", 1.0, "last_user")),
        plan("gated", edit("clamp", 200.0, "all", 21), gate=gate(85.0)),
        plan(
            "two-sided",
            edit("clamp", 200.0, "generated", 23),
            gate=gate(95.0),
            otherwise=Branch(gate=gate(80.0, 5), edits=(edit("add", -150.0, "all", 25),)),
        ),
        plan("wide", edit("clamp", 120.0, "all", 17), sae=1),
        plan("drop", edit("clamp", 20.0, "generated", 19, error_term="drop")),
        plan("correct", edit("clamp", 20.0, "all", 19, error_term="correct", correction=("e0", "e1"))),
        plan("cone", dense("clamp_direction", 20.0), dense("floor_direction", 9.0, "all", "w")),
        plan("growing", edit("clamp", 200.0, "all", 21), gate=gate(75.0, least=0.25, full=110.0)),
    )


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    text: str
    ids: tuple[int, ...]
    done: Done


@cache
def alone(prompt: tuple[int, ...], number: int, max_tokens: int) -> tuple[str, Receipt | None]:
    """The reply to a single request, by the library's plain path: one row, `steer` around the whole of it."""
    plan = plans()[number]
    with steer(model(), plan, [] if plan is None else _of(plan), require_reach=False) as steering:
        reply = generate(model(), [prompt], max_new_tokens=max_tokens)[0]
        receipt = steering.receipts()[0]
    return reply.text, receipt


def _of(plan: Plan) -> list[Sae]:
    return [sae for sae in saes() if any(ref.revision == sae.revision for ref in plan.saes)]


async def ask(engine: Engine, request: Request, *, delay: float = 0.0) -> Answer:
    """Submit a request and read all of its answer."""
    await asyncio.sleep(delay)
    text, ids = "", []
    async for item in engine.submit(request):
        if isinstance(item, Piece):
            text += item.text
            ids += [token.id for token in item.tokens]
        else:
            return Answer(text, tuple(ids), item)
    raise AssertionError("a stream ended without Done")


def requests(max_tokens: int = 16, only: Sequence[tuple[int, ...]] | None = None) -> list[Request]:
    """Every plan with its own share of the prompts, mixed."""
    asked = only or prompts()
    sampling = Sampling(max_tokens=max_tokens)
    found = [Request("", prompt, plans()[i % len(plans())], sampling) for i, prompt in enumerate(asked)]
    return [replace(request, id=str(i)) for i, request in enumerate(found)]
