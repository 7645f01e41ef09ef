"""Attention sinks: tokens whose residual is many times longer than that of all others, and says nothing of the text.

The first token of many models is one, and sometimes the first delimiters. SAEs explode there, maxima and means of a
prompt are about it, and an edit there moves what every later token looks at. So they are left out, by name:

    a token is a sink at a site  <=>  ||x|| > limit,   limit = 4.5 x the median length at that site

1. The median is that of all tokens of a few short prompts, read once per model and site. A site where none of those
   tokens passes the limit has no sinks: its limit is infinite, and nothing changes there.
2. Whether a token is one is asked of its own residual. So the answer is the same in a batch, a piece of a prompt, a
   cache or a packed pass, wherever a sink stands and whatever token it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clampdown.activations.capture import forward_to
from clampdown.models.chat import pad_left, render
from clampdown.models.loading import LanguageModel
from clampdown.types import Message, Point, Site

FACTOR = 4.5
RESIDUAL = (Point.RESID_PRE, Point.RESID_POST)
NEUTRAL = ("Hello.", "What is the capital of Italy?", "Thank you.", "Name three colours, one a line.\n\nThe first is")


@dataclass(frozen=True, slots=True)
class Sinks:
    """The sinks of a model at a site: the length beyond which a token is one, and which of the short prompts' tokens
    were: by position, what they say, and how many medians long they are. No tokens: no sinks, an infinite limit."""

    site: Site
    limit: float
    tokens: tuple[tuple[int, str, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def outside(self, x: Float[Tensor, "*tokens d_model"]) -> Bool[Tensor, "*tokens"]:
        """Which tokens are no sinks."""
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) <= self.limit

    @property
    def in_words(self) -> str:
        """One line for whoever reads a report."""
        if not self:
            return f"no attention sinks at {self.site}"
        found = ", ".join(f"{text!r} at {at} ({times:.0f} x)" for at, text, times in self.tokens)
        return f"attention sinks at {self.site}, left out: {found}"


_FOUND: WeakKeyDictionary[object, dict[tuple[Site, int], Sinks]] = WeakKeyDictionary()


def sinks_at(lm: LanguageModel, sites: Sequence[Site]) -> dict[Site, Sinks]:
    """The sinks at each site. One pass over a few short prompts, for sites that were not asked about before. A model
    without weights (a shape) has none, nor have the outputs of attention and MLPs, whose lengths differ by nature."""
    residual = [site for site in sites if site.point in RESIDUAL and lm.device.type != "meta"]
    return {site: Sinks(site, math.inf) for site in sites} | _of_residual(lm, residual)


def _of_residual(lm: LanguageModel, sites: Sequence[Site]) -> dict[Site, Sinks]:
    known = _FOUND.setdefault(lm.model, {})
    # Weights that a spread model keeps on disk come and go with every pass, and nobody edits them there.
    changed = sum(parameter._version for parameter in lm.model.parameters() if parameter.device.type != "meta")
    new = [site for site in dict.fromkeys(sites) if (site, changed) not in known]
    if new:
        prompts = [neutral_ids(lm, text) for text in NEUTRAL]
        batch = pad_left(prompts, lm.pad_id, lm.device)
        real = batch.attention_mask.bool()
        for site, residual in forward_to(lm, batch, new).items():
            lengths = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)[real].cpu()
            known[site, changed] = sinks_among(lm, site, prompts, lengths)
    return {site: known[site, changed] for site in sites}


def neutral_ids(lm: LanguageModel, text: str) -> list[int]:
    """One of the short prompts as token ids."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return list(lm.tokenizer(text)["input_ids"])
    rendered = render(lm.tokenizer, [Message("user", text)], add_generation_prompt=True)
    return list(lm.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def sinks_among(
    lm: LanguageModel, site: Site, prompts: Sequence[Sequence[int]], lengths: Float[Tensor, " tokens"]
) -> Sinks:
    """The sinks of a site from how long its residual is at every token of the short prompts, one after the other."""
    median = float(lengths.median())
    tokens = {}
    where = [(at, token) for ids in prompts for at, token in enumerate(ids)]
    for (at, token), length in zip(where, lengths.tolist(), strict=True):
        if median > 0 and length > FACTOR * median:
            tokens.setdefault((at, str(lm.tokenizer.decode([token]))), length / median)
    found = tuple((at, text, times) for (at, text), times in sorted(tokens.items()))
    return Sinks(site, FACTOR * median if found else math.inf, found)
