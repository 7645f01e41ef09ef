"""lm-evaluation-harness's own steering files, for its model `steered`: `.pt` of vectors, and CSV of SAE features.

1. A hookpoint names a module of the base model by its path; what is done acts on that module's output, at every token:
   `add` adds coefficient x vector, `clamp` sets the projection onto the vector to the coefficient. Its clamp does not
   know an SAE's activation; for us it is an ablation of the direction and an addition along it.
2. One entry per hookpoint, so edits at one place must come to one of the two.
3. A CSV names SAE features, one a hookpoint (later rows replace earlier ones). The harness's 0.4.13 reads such a file
   and then refuses `add` rows, because it takes the SAE's bias along: until that is mended upstream, use `.pt`.
"""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clampdown.errors import SiteError, SteeringFileError, translated
from clampdown.interop.exports.forms import Bound, Unsaid, Words, ablations, offsets
from clampdown.interop.exports.wanted import Wanted, checked, plan_of
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import open_sae
from clampdown.steering.plan import Edit, Plan
from clampdown.store import write_atomic
from clampdown.types import Point, Site

COLUMNS = ("loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient", "head_index",
           "sae_id", "description", "")  # fmt: skip
_PARALLEL = 1e-4


# ---- hookpoints --------------------------------------------------------------------------------------------------


def _module_of(site: Site, lm: LanguageModel) -> nn.Module | None:
    """The module whose output a site is; None for the embeddings."""
    if site.point is Point.RESID_PRE:
        if not site.layer:
            return None
        site = Site(site.layer - 1)
    return lm.layout.hook_point(site).module


def hookpoint(site: Site, lm: LanguageModel) -> str | None:
    """The path of the site's module below the base model; None when no module's output is that site."""
    module = _module_of(site, lm)
    paths = (name for name, found in lm.model.base_model.named_modules() if found is module)
    return None if module is None else next(paths, None)


def site_of(path: str, lm: LanguageModel) -> Site:
    """The site that a hookpoint is. Raises `SteeringFileError`."""
    for layer in range(lm.n_layers):
        for point in (Point.RESID_POST, Point.ATTN_OUT, Point.MLP_OUT):
            try:
                if hookpoint(Site(layer, point), lm) == path:
                    return Site(layer, point)
            except SiteError:
                continue
    raise SteeringFileError(
        f"hookpoint '{path[:80]}' is no place that a plan can edit in this model",
        hint=f"such as '{hookpoint(Site(0), lm)}', relative to the base model",
    )


def _no_place(site: Site, lm: LanguageModel) -> str | None:
    if hookpoint(site, lm) is None:
        return "the harness hooks outputs of modules, and no block's output is this site"
    return None


# ---- .pt ---------------------------------------------------------------------------------------------------------


def _entries(bound: Bound) -> dict[str, dict[str, Any] | None]:
    """What a `.pt` file holds, by hookpoint; None where edits at one place come to neither `add` nor `clamp`."""
    added: dict[str, Tensor] = {}
    removed: dict[str, list[tuple[Tensor, float]]] = {}
    for site, vector in offsets(bound).items():
        path = hookpoint(site, bound.lm) or ""
        added[path] = added.get(path, torch.zeros_like(vector)) + vector
    for site, directions in ablations(bound.plan).items():
        removed.setdefault(hookpoint(site, bound.lm) or "", []).extend(directions)
    return {path: _entry(added.get(path), removed.get(path, [])) for path in {**added, **removed}}


def _entry(added: Tensor | None, removed: list[tuple[Tensor, float]]) -> dict[str, Any] | None:
    if not removed and added is not None:
        return {
            "steering_vector": added,
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
    if len(removed) != 1 or removed[0][1] != 1.0:
        return None
    unit = removed[0][0]
    along = 0.0 if added is None else float(added @ unit)
    if added is not None and float((added - along * unit).norm()) > _PARALLEL * max(1.0, float(added.norm())):
        return None
    return {"steering_vector": unit, "steering_coefficient": along, "action": "clamp", "bias": None, "head_index": None}


def _one_each(bound: Bound) -> Iterator[Unsaid]:
    if any(_no_place(Site.parse(edit.site), bound.lm) for edit in bound.plan.edits):
        return
    said = [edit for edit in bound.plan.edits if edit.operator in STEERED.operators]
    for path, entry in _entries(bound.saying(bound.plan.changed(edits=tuple(said)))).items():
        if entry is None:
            why = "the harness does one thing at a hookpoint: add a vector, or set the projection onto one"
            yield Unsaid(f"the edits at {path}", why, None)


STEERED = Words(frozenset({"add", "add_direction", "ablate_direction"}), place=_no_place, more=_one_each)


def write_steered(bound: Bound, path: Path) -> None:
    """Write a `.pt` file: tensors and plain values, which unpickling with `weights_only` accepts."""
    buffer = io.BytesIO()
    torch.save(_entries(bound), buffer)
    write_atomic(path, buffer.getvalue())


def read_steered(wanted: Wanted) -> Plan:
    """The plan that a `.pt` file says. Nothing in it is executed. Raises `SteeringFileError`."""
    wanted.refuse_operator()
    if not wanted.path.is_file():
        raise SteeringFileError(f"cannot read {wanted.path}: no such file")
    with translated(SteeringFileError, f"{wanted.path} is not a file of vectors"):
        try:
            found = torch.load(wanted.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise SteeringFileError(f"{wanted.path} holds more than tensors: it would run code") from error
    if not isinstance(found, dict) or not found or not all(isinstance(one, dict) for one in found.values()):
        raise SteeringFileError(f"{wanted.path} is no steering file: it is not a dictionary of hookpoints")
    edits, vectors = [], {}
    for path, entry in found.items():
        _add_entry(wanted, site_of(str(path), wanted.lm), entry, edits, vectors)
    return plan_of(wanted, edits, vectors)


def _add_entry(
    wanted: Wanted, site: Site, entry: dict[str, Any], edits: list[Edit], vectors: dict[str, tuple[float, ...]]
) -> None:
    vector, action = entry.get("steering_vector"), entry.get("action")
    coefficient, bias = entry.get("steering_coefficient", 1.0), entry.get("bias")
    if entry.get("head_index") is not None:
        raise SteeringFileError(f"{wanted.source} steers one attention head, which no plan can")
    if not isinstance(vector, Tensor) or type(coefficient) not in (int, float):
        raise SteeringFileError(f"{wanted.source}: {site} needs a `steering_vector` and a `steering_coefficient`")
    flat = vector.detach().float()
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    if action == "add" and bias is None:
        _add_vector(wanted, site, flat, coefficient * wanted.factor(), edits, vectors)
    elif action == "clamp":
        _add_clamp(wanted, site, flat, float(coefficient), bias, edits, vectors)
    else:
        raise SteeringFileError(f"{wanted.source}: {site} has the action {str(action)[:40]!r}", hint="add or clamp")


def _add_vector(
    wanted: Wanted, site: Site, vector: Float[Tensor, " d"], strength: float, edits: list[Edit], vectors: dict
) -> None:
    vectors[site.name] = checked(wanted, site, vector)
    edits.append(_dense(wanted, site, "add_direction", site.name, strength))


def _add_clamp(
    wanted: Wanted,
    site: Site,
    vector: Float[Tensor, " d"],
    value: float,
    bias: Float[Tensor, " d"] | None,
    edits: list[Edit],
    vectors: dict,
) -> None:
    """x + d (value - (x - bias) . d), d of length 1: the projection is taken out, and value + bias . d put in."""
    if not float(vector.norm()):
        raise SteeringFileError(f"{wanted.source}: {site} is clamped along a vector of length 0")
    unit = vector / vector.norm()
    vectors[site.name] = checked(wanted, site, unit)
    along = value if bias is None else value + float(torch.tensor(checked(wanted, site, bias)) @ unit)
    edits.append(_dense(wanted, site, "ablate_direction", site.name, 1.0))
    if along:
        edits.append(_dense(wanted, site, "add_direction", site.name, along))


def _dense(wanted: Wanted, site: Site, operator: str, vector: str, strength: float) -> Edit:
    return Edit(site=site.name, operator=operator, vector=vector, strengths=(strength,), scope=wanted.scope)


# ---- CSV ---------------------------------------------------------------------------------------------------------


def _address(bound: Bound, site: str) -> tuple[str, str, str] | None:
    """(loader, sparse model, id) by which the harness finds an SAE; None for one that it cannot find."""
    name = bound.saes[site].name
    directory = Path(name)
    if (directory / "sae.safetensors").is_file():
        known = directory.name == hookpoint(Site.parse(site), bound.lm)
        return ("sparsify", str(directory.parent), "") if known else None
    release, colon, sae_id = name.partition(":")
    return ("sae_lens", release, sae_id) if colon and "/" not in release else None


def _rows_fit(bound: Bound) -> Iterator[Unsaid]:
    said = [edit for edit in bound.plan.edits if edit.features]
    for site in dict.fromkeys(edit.site for edit in said):
        if sum(len(edit.features) for edit in said if edit.site == site) > 1:
            why = "the harness keeps the last row of a hookpoint"
            yield Unsaid(f"several features at {site}", why, None)
        if _address(bound, site) is None:
            why = "the harness finds SAEs as a SAELens release and id, or in sparsify's directories named by hookpoint"
            yield Unsaid(f"features of '{bound.saes[site].name}'", why, None)


FEATURE_ROWS = Words(frozenset({"add"}), place=_no_place, more=_rows_fit)


def write_feature_rows(bound: Bound, path: Path) -> None:
    """Write a CSV file, a row per feature."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for edit in bound.plan.edits:
        address = _address(bound, edit.site)
        assert address is not None, edit.site
        loader, model, sae_id = address
        where = hookpoint(Site.parse(edit.site), bound.lm)
        writer.writerow([loader, "add", model, where, edit.features[0], edit.strengths[0], "", sae_id,
                         bound.plan.name, ""])  # fmt: skip
    write_atomic(path, text.getvalue())


def read_feature_rows(wanted: Wanted) -> Plan:
    """The plan that a CSV file says: `add` rows stay features, `clamp` rows act on the projection, as the harness has
    it. Raises `SteeringFileError` naming the line."""
    wanted.refuse_operator()
    rows = _rows(wanted.path)
    edits, vectors, saes = [], {}, {}
    for number, row in rows:
        sae, feature = _feature(wanted, number, row)
        site = site_of(row["hookpoint"], wanted.lm) if row.get("hookpoint") else sae.cfg.site
        if site.name in saes:
            raise SteeringFileError(f"{wanted.path} line {number}: the harness would keep this row of {site} alone")
        saes[site.name] = sae
        coefficient = _number(wanted.path, number, row)
        if row.get("action") == "clamp":
            view = sae.select([feature])
            _add_clamp(wanted, site, view.directions[0].float(), coefficient, view.b_dec.float(), edits, vectors)
            continue
        if site != sae.cfg.site:
            raise SteeringFileError(f"{wanted.path} line {number}: the SAE reads {sae.cfg.site}, not {site}")
        strength = coefficient * wanted.factor()
        edits.append(
            Edit(site=site.name, operator="add", features=(feature,), strengths=(strength,), scope=wanted.scope)
        )
    used = tuple(saes[edit.site] for edit in edits if edit.features)
    return plan_of(wanted, edits, vectors, used)


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SteeringFileError(f"cannot read {path}: {error}") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = {"sparse_model", "hookpoint", "feature_index", "steering_coefficient"} - set(reader.fieldnames or ())
    if missing:
        raise SteeringFileError(f"{path} has no column '{min(missing)}'", hint=f"columns: {','.join(COLUMNS)}")
    rows = [(number, {key: (value or "").strip() for key, value in row.items() if key}) for number, row in
            enumerate(reader, 2)]  # fmt: skip
    if not rows:
        raise SteeringFileError(f"{path} holds no rows")
    return rows


def _feature(wanted: Wanted, number: int, row: dict[str, str]) -> tuple[Any, int]:
    loader = row.get("loader") or "sparsify"
    if loader not in ("sparsify", "sae_lens") or row.get("head_index"):
        what = f"loader '{loader[:40]}'" if loader not in ("sparsify", "sae_lens") else "one attention head"
        raise SteeringFileError(f"{wanted.path} line {number}: {what} is not known here")
    if row.get("action", "add") not in ("", "add", "clamp"):
        raise SteeringFileError(f"{wanted.path} line {number}: action '{row['action'][:40]}' is neither add nor clamp")
    name = wanted.sae or (f"{row['sparse_model']}:{row.get('sae_id')}" if loader == "sae_lens" else _sparsify(row))
    if not row["feature_index"].isdecimal():
        raise SteeringFileError(f"{wanted.path} line {number}: '{row['feature_index'][:40]}' is not a feature's number")
    return open_sae(name, device=str(wanted.lm.device)), int(row["feature_index"])


def _sparsify(row: dict[str, str]) -> str:
    directory = Path(row["sparse_model"])
    return str(directory / row["hookpoint"]) if directory.is_dir() else f"{row['sparse_model']}:{row['hookpoint']}"


def _number(path: Path, number: int, row: dict[str, str]) -> float:
    try:
        return float(row["steering_coefficient"])
    except ValueError as error:
        raise SteeringFileError(f"{path} line {number}: '{row['steering_coefficient'][:40]}' is no number") from error
