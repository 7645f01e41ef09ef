"""Where a site's hooks go on the model, and in which order: before all others of their module, in the order given.

Whatever else looks at the residual (the library's own capture of hidden states, a probe) then sees it steered, whether
it was put on before or after. What goes into a block is what comes out of the one below, so it is changed there: hidden
states, which are what blocks give out, show that too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clampdown.models.layout import HiddenFn, HookPoint
from clampdown.models.loading import LanguageModel
from clampdown.types import Point, Site


def hook_point(lm: LanguageModel, site: Site) -> HookPoint:
    """Raises `SiteError` when the model has no such layer or point."""
    point = lm.layout.hook_point(site)
    if site.point is Point.RESID_PRE and site.layer:
        return lm.layout.hook_point(Site(site.layer - 1, Point.RESID_POST))
    return point


def attach_in_order(lm: LanguageModel, hooks: Sequence[tuple[Site, HiddenFn]]) -> list[Any]:
    """The handles of these hooks, which run in this order and first."""
    return [hook_point(lm, site).register(fn, first=True) for site, fn in reversed(hooks)]
