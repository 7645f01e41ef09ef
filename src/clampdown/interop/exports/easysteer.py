"""EasySteer's steering specification (JSON), as its `--steering-config` and the HTTP field `steering` take it.

One entry per scope and kind of edit, applied one after the other: `erase` projects a direction out, `direct` adds a
vector, at the outputs of blocks. Vectors travel inside, as base64 of little-endian float32 with a checksum. EasySteer
tells prompt from generation as plans do, so the scopes `prompt` and `generated` are said exactly.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.documents import read_object
from clampdown.errors import SteeringFileError
from clampdown.interop.exports.forms import Bound, Unsaid, Words, ablations, offsets, output_of
from clampdown.interop.exports.wanted import Wanted, checked, plan_of
from clampdown.models.loading import LanguageModel
from clampdown.steering.plan import Edit, Plan
from clampdown.store import write_atomic
from clampdown.types import Site

APPLY: dict[str, dict[str, str]] = {
    "all": {"prompt": "all", "generation": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generation": "all"},
}
WIRE_VERSION = 1
OPERATORS = {"direct": "add_direction", "erase": "ablate_direction"}

ByBlock = dict[int, Float[Tensor, " d_model"]]


def _place(site: Site, _lm: LanguageModel) -> str | None:
    return "EasySteer acts on the outputs of blocks, and this site is not one" if output_of(site) is None else None


def _one_ablation(bound: Bound) -> Iterator[Unsaid]:
    for site, directions in ablations(bound.plan).items():
        if len(directions) > 1:
            yield Unsaid(f"{len(directions)} ablations at {site}", "EasySteer would do one after the other", None)
        if any(strength != 1.0 for _, strength in directions):
            yield Unsaid(f"a part of a direction ablated at {site}", "EasySteer erases all of it", None)


SPECIFICATION = Words(
    frozenset({"add", "add_direction", "ablate_direction"}), frozenset(APPLY), place=_place, more=_one_ablation
)


def write_specification(bound: Bound, path: Path) -> None:
    """Write the specification. Directions are erased first: what a plan adds is not projected out again."""
    scopes = list(dict.fromkeys(edit.scope for edit in bound.plan.edits))
    parts = {scope: bound.saying(_only(bound.plan, scope)) for scope in scopes}
    vectors = [_entry("erase", _erased(part), scope) for scope, part in parts.items()]
    vectors += [_entry("direct", _added(part), scope) for scope, part in parts.items()]
    content = {"vectors": [entry for entry in vectors if entry is not None], "conflict": "sequential"}
    write_atomic(path, json.dumps(content, indent=1))


def _only(plan: Plan, scope: str) -> Plan:
    return plan.changed(edits=tuple(edit for edit in plan.edits if edit.scope == scope))


def _added(bound: Bound) -> ByBlock:
    found: ByBlock = {}
    for site, vector in offsets(bound).items():
        block = output_of(site)
        assert block is not None, site
        found[block] = found.get(block, torch.zeros_like(vector)) + vector
    return found


def _erased(bound: Bound) -> ByBlock:
    found: ByBlock = {}
    for site, ((direction, _),) in ablations(bound.plan).items():
        block = output_of(site)
        assert block is not None, site
        found[block] = direction
    return found


def _entry(algorithm: str, directions: ByBlock, scope: str) -> dict[str, Any] | None:
    if not directions:
        return None
    return {
        "algorithm": algorithm,
        "scale": 1.0,
        "normalize": False,
        "layers": sorted(directions),
        "apply": APPLY[scope],
        "data": _wire(directions),
    }


def _wire(directions: ByBlock) -> dict[str, Any]:
    tensors = {f"layer.{block}": directions[block].float().numpy() for block in sorted(directions)}
    digest = hashlib.sha256(f"direction:{WIRE_VERSION}".encode())
    for name in sorted(tensors):
        digest.update(name.encode() + str(tensors[name].shape).encode() + tensors[name].astype("<f4").tobytes())
    packed = {
        name: {"shape": list(values.shape), "data": base64.b64encode(values.astype("<f4").tobytes()).decode()}
        for name, values in tensors.items()
    }
    return {"version": WIRE_VERSION, "kind": "direction", "tensors": packed, "extra": {}, "sha256": digest.hexdigest()}


def read_specification(wanted: Wanted) -> Plan:
    """The plan that a specification says, if it holds its vectors itself. Raises `SteeringFileError`."""
    wanted.refuse_operator()
    entries = read_object(wanted.path, SteeringFileError).get("vectors")
    if not isinstance(entries, list) or not entries or not all(isinstance(one, Mapping) for one in entries):
        raise SteeringFileError(f"{wanted.path} is no specification of EasySteer: it has no list `vectors`")
    edits: list[Edit] = []
    vectors: dict[str, tuple[float, ...]] = {}
    for number, entry in enumerate(entries):
        _read_entry(wanted, number, entry, edits, vectors)
    return plan_of(wanted, edits, vectors)


def _read_entry(
    wanted: Wanted, number: int, entry: Mapping[str, Any], edits: list[Edit], vectors: dict[str, tuple[float, ...]]
) -> None:
    where = f"{wanted.path}: vector {number}"
    operator, data = OPERATORS.get(str(entry.get("algorithm", "direct"))), entry.get("data")
    scopes = [scope for scope, apply in APPLY.items() if apply == entry.get("apply")]
    if operator is None or not scopes or entry.get("normalize"):
        raise SteeringFileError(
            f"{where} does what no plan can: {str(entry.get('algorithm'))[:40]}, normalize "
            f"{entry.get('normalize')}, apply {str(entry.get('apply'))[:80]}"
        )
    if not isinstance(data, Mapping) or data.get("kind") != "direction" or not isinstance(data.get("tensors"), Mapping):
        raise SteeringFileError(f"{where} does not hold its directions", hint="import the file that it names")
    scale = entry.get("scale", 1.0)
    if type(scale) not in (int, float):
        raise SteeringFileError(f"{where}: its scale is no number")
    for name, tensor in data["tensors"].items():
        site = Site(_block(where, str(name)))
        if entry.get("layers") is not None and site.layer not in entry["layers"]:
            continue
        key = f"{number} {site.name}"
        vectors[key] = checked(wanted, site, _unpacked(where, tensor))
        strength = scale * wanted.factor() if operator == "add_direction" else 1.0
        scope = wanted.scope if wanted.scope != "all" else scopes[0]
        edits.append(Edit(site=site.name, operator=operator, vector=key, strengths=(strength,), scope=scope))


def _block(where: str, name: str) -> int:
    block = name.removeprefix("layer.")
    if block == name or not block.isdecimal():
        raise SteeringFileError(f"{where}: '{name[:40]}' is not the vector of a layer")
    return int(block)


def _unpacked(where: str, tensor: Any) -> Float[Tensor, " width"]:
    try:
        raw = bytearray(base64.b64decode(tensor["data"], validate=True))
        return torch.frombuffer(raw, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise SteeringFileError(f"{where}: a vector cannot be read: {error}") from error
