"""Neuronpedia: features by the address of their page, and the list of features that its steering API takes.

A page is `<model>/<layer and set>/<number>`. Its steering adds strength x decoder row to the residual at every token,
where `strength_multiplier` is 1 and special tokens are steered: the operator `add`, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clampdown.errors import SteeringFileError
from clampdown.interop.exports.forms import Bound, Unsaid, Words
from clampdown.interop.exports.wanted import Wanted
from clampdown.saes.catalog import PAGES, find_release, release_of_page
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import check_fits
from clampdown.steering.plan import Plan
from clampdown.steering.units import Strength
from clampdown.store import write_atomic
from clampdown.study.plan import Request, plan_of

_PAGE = re.compile(r"(?:https?://(?:www\.)?neuronpedia\.org/)?([\w.-]+)/(\d[\w.-]*)/(\d+)/?(?:[?#].*)?")


class Page(NamedTuple):
    """A feature's page: the SAE's part of the address, and the feature."""

    sae: str
    feature: int


def page_of(source: str) -> Page | None:
    """The page that an address means; None for other text."""
    match = _PAGE.fullmatch(source.strip())
    return None if match is None else Page(f"{match[1]}/{match[2]}", int(match[3]))


def is_page(source: str) -> bool:
    """Whether text is the address of a feature's page."""
    return page_of(source) is not None


def _published(bound: Bound) -> Iterator[Unsaid]:
    sites = dict.fromkeys(edit.site for edit in bound.plan.edits if edit.features)
    for site in sites:
        if bound.saes[site].cfg.neuronpedia_id is None:
            yield Unsaid(f"features of '{bound.saes[site].name}'", "this SAE is not known to have pages there", None)


FEATURES = Words(frozenset({"add"}), more=_published)


def write_features(bound: Bound, path: Path) -> None:
    """Write the body of a request to `/api/steer` without its prompt, and each feature's page."""
    features = []
    for edit in bound.plan.edits:
        model, _, layer = str(bound.saes[edit.site].cfg.neuronpedia_id).partition("/")
        for feature, strength in zip(edit.features, edit.strengths, strict=True):
            features.append({"modelId": model, "layer": layer, "index": feature, "strength": strength})
    content = {
        "modelId": features[0]["modelId"],
        "features": features,
        "strength_multiplier": 1,
        "steer_method": "SIMPLE_ADDITIVE",
        "steer_special_tokens": True,
        "pages": [f"{PAGES}/{one['modelId']}/{one['layer']}/{one['index']}" for one in features],
    }
    write_atomic(path, json.dumps(content, indent=1))


def model_of_page(source: str) -> str | None:
    """The model whose SAE a page is about, where the catalogue knows it."""
    page = page_of(source)
    release = page and release_of_page(page.sae)
    address = find_release(release) if release else None
    return address.model if address else None


def read_page(wanted: Wanted) -> Plan:
    """A plan that steers the feature of a page. Raises `SteeringFileError` without a known SAE or a strength."""
    page = page_of(wanted.source)
    if page is None:
        raise SteeringFileError(
            f"'{wanted.source[:120]}' is not a feature's page", hint=f"{PAGES}/llama3-8b-it/25-res-jh/35831"
        )
    if wanted.strength is None:
        raise SteeringFileError(f"a page does not say how strongly to steer feature {page.feature}",
                                hint="--strength 12, or 1.5p99 with --prompts FILE")  # fmt: skip
    name = wanted.sae or release_of_page(page.sae)
    if name is None:
        raise SteeringFileError(f"no SAE of the catalogue has the pages {page.sae}", hint="name it with --sae")
    sae = open_sae(name, device=str(wanted.lm.device))
    stated = sae.cfg.neuronpedia_id
    if stated not in (None, page.sae):
        raise SteeringFileError(f"the pages of SAE '{name}' are {stated}, not {page.sae}")
    check_fits(sae, wanted.lm.d_model, wanted.lm.n_layers)
    request = Request(
        (page.feature,),
        (Strength.parse(wanted.strength),),
        wanted.operator or "add",
        wanted.scope,
        name=wanted.name or f"{page.sae}/{page.feature}",
    )
    plan = plan_of(wanted.lm, sae, request, wanted.prompts)
    return plan.changed(provenance={**plan.provenance, "imported": f"{PAGES}/{page.sae}/{page.feature}"})
