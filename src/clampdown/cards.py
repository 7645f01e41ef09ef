"""The feature card: everything that a person needs to judge one feature, as one JSON file.

A command measures and writes it; `reports` renders it, on any machine, without a model. Activations are in the SAE's
own units. Template and special tokens are shown and never ranked: a feature that peaks on a header says little of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clampdown.documents import from_json, read_json
from clampdown.errors import StoreError
from clampdown.notebook import html_table
from clampdown.store import SCHEMA, to_jsonable, write_json
from clampdown.types import Interval, Provenance, ScoreSource


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a conversation and the feature's activation there. `content` is False for template and special
    tokens."""

    text: str
    value: float
    content: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt as the model read it. `peak` is its largest activation on a content token; the other pieces are cut
    where the conversation is long (`cut` says whether)."""

    suite: str
    prompt_id: str
    peak: float
    tokens: tuple[Token, ...]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Firing:
    """On how many of a suite's prompts the feature fires: on any content token, and at the assistant's start, where
    the reply is decided. `mean_peak` averages the prompts' peaks on content tokens."""

    suite: str
    on_content: Interval
    at_start: Interval
    mean_peak: float


@dataclass(frozen=True, slots=True)
class TokenEffect:
    """A token of the vocabulary and how far the feature's decoder row moves its logit, up to the final norm's scale."""

    text: str
    effect: float


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A feature whose decoder row points nearly the same way. `together` is the share of this feature's active content
    tokens at which the neighbour is active too; None when it was never active."""

    feature: int
    cosine: float
    together: float | None
    promoted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often the feature has which activation on content tokens: `counts[i]` between `edges[i]` and `edges[i + 1]`;
    `inactive` tokens have none."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    inactive: int


@dataclass(frozen=True, slots=True)
class CardScore:
    """A score with its place among all features that have it (1 is the largest), and where it came from."""

    name: str
    value: float
    place: int
    among: int
    source: ScoreSource


@dataclass(frozen=True, slots=True)
class Card:
    """One feature of one SAE. `promoted` and `demoted` start with the strongest; `examples` with the highest peak."""

    feature: int
    site: str
    architecture: str
    d_sae: int
    neuronpedia: str | None
    provenance: Provenance
    scores: tuple[CardScore, ...]
    promoted: tuple[TokenEffect, ...]
    demoted: tuple[TokenEffect, ...]
    firing: tuple[Firing, ...]
    histogram: Histogram
    examples: tuple[Example, ...]
    neighbours: tuple[Neighbour, ...]

    @property
    def scale(self) -> float:
        """The largest absolute activation on a content token of an example: full colour."""
        return max((abs(t.value) for e in self.examples for t in e.tokens if t.content), default=0.0)

    def __repr__(self) -> str:
        promoted = ", ".join(repr(token.text) for token in self.promoted[:3])
        return f"Card(feature {self.feature} at {self.site}: promotes {promoted or 'nothing'})"

    def _repr_html_(self) -> str:
        """Where it fires, and what it promotes; the whole card is a page (`clampdown features show N --html FILE`)."""
        rows = [
            (f.suite, _rate(f.on_content), _rate(f.at_start), f"{f.mean_peak:.3g}", str(f.on_content.n))
            for f in self.firing
        ]
        headings = ("suite", "fires on any token, %", "at the reply's start, %", "mean peak", "prompts")
        promoted, demoted = (" ".join(repr(t.text) for t in side[:8]) for side in (self.promoted, self.demoted))
        caption = f"Feature {self.feature} at {self.site}. Promotes {promoted}; demotes {demoted}."
        return html_table(headings, rows, caption)


def _rate(found: Interval) -> str:
    if found.value is None:
        return "not measured"
    return f"{100 * found.value:.0f} [{100 * (found.low or 0):.0f}, {100 * (found.high or 0):.0f}]"


def write_card(path: Path, card: Card) -> None:
    write_json(path, {"schema": SCHEMA, "kind": "feature_card", **to_jsonable(card)})


def read_card(path: Path) -> Card:
    """Read what `write_card` wrote. Raises `StoreError` for other files and schema versions."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("kind") != "feature_card" or raw.get("schema") != SCHEMA:
        raise StoreError(
            f"{path} is not a feature card of schema {SCHEMA}", hint="clampdown features show ID --json FILE"
        )
    try:
        return from_json(Card, {key: value for key, value in raw.items() if key not in ("schema", "kind")})
    except ValueError as error:
        raise StoreError(f"{path} is not a feature card: {error}") from error
