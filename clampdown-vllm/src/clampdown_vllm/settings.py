"""What the operator asked for: the entry `clampdown` of vLLM's `additional_config`.

The front end reads it once, checks every plan, and writes what it found back into the configuration: files, digests and
sites. So each process can compare what it loads with what was checked, and vLLM's compile cache has them in its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from clampdown.errors import PlanError

KEY = "clampdown"
"""The entry in `additional_config`, in `vllm_xargs` and in a request's `extra_args`."""


class Settings(BaseModel):
    """`plans`: files and directories of plans. `saes`: other SAEs than those that plans name, one per site. `scorers`:
    external gates by name, as "module:function". `one_pass`: let a gate decide in the prompt's own pass where that is
    exact. The rest is filled in by the front end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plans: tuple[str, ...] | str
    saes: tuple[str, ...] = ()
    scorers: dict[str, str] = {}
    audit: str | None = None
    one_pass: bool = True
    allow_untested: tuple[str, ...] = ()
    digests: dict[str, str] = {}
    sites: tuple[str, ...] = ()
    resolved: Literal[True] | None = None
    plugin: str | None = None

    @property
    def plan_paths(self) -> tuple[Path, ...]:
        return tuple(Path(p) for p in ([self.plans] if isinstance(self.plans, str) else self.plans))


def settings_of(config: Any) -> Settings | None:
    """Of a vLLM configuration; None when it asks for no plans. Raises `PlanError` when it is malformed."""
    given = config.additional_config
    if not isinstance(given, Mapping) or KEY not in given:
        return None
    try:
        return Settings.model_validate(given[KEY])
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise PlanError("additional_config.clampdown is not valid: " + "; ".join(lines)) from error
