"""When an engine's configuration is made: plans are read and checked, and what was not tested is refused.

What was found is written back into it, for every other process.
"""

from __future__ import annotations

from typing import Any

from clampdown.errors import ChatTemplateError
from clampdown.models.loading import LanguageModel, load_identity
from clampdown_vllm import PLUGIN_VERSION
from clampdown_vllm import install as hooks
from clampdown_vllm.book import check_book, open_book
from clampdown_vllm.front.desk import Desk
from clampdown_vllm.front.ledger import Ledger
from clampdown_vllm.front.typed import control_texts
from clampdown_vllm.runners.patching import wrap
from clampdown_vllm.settings import KEY, settings_of
from clampdown_vllm.versions import TESTED, refuse_untested, refuse_version

DESKS: dict[str, Desk] = {}
"""By the key of what was checked: an engine finds its desk by its own configuration."""


def install() -> None:
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_engine_config", _create)


def version() -> str:
    from vllm import __version__

    return __version__


def version_is_tested() -> bool:
    return version().partition("+")[0] in TESTED


def _create(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    config = before(self, *args, **kwargs)
    settings = settings_of(config)
    if settings is None or settings.resolved:
        return config
    refuse_version(version(), settings.allow_untested)
    if not version_is_tested():
        hooks.everything()
    refuse_untested(config, settings.allow_untested)
    hooks.front_end()
    open_desk(config)
    return config


def open_desk(config: Any) -> Desk:
    """Read and check everything that the configuration names. Raises `PlanError`, `PlanMismatchError` and kin."""
    settings = settings_of(config)
    assert settings is not None, "only engines with plans have a desk"
    book = open_book(settings)
    model = config.model_config
    lm = load_identity(model.model, revision=model.revision)
    check_book(book, lm)
    found = {"digests": book.digests, "sites": list(book.sites), "resolved": True, "plugin": PLUGIN_VERSION}
    config.additional_config[KEY] = {**settings.model_dump(mode="json", exclude_none=True), **found}
    ledger = Ledger.open(settings, book, lm)
    desk = Desk(book, lm, settings, config.scheduler_config.max_num_batched_tokens, ledger, _controls(lm))
    DESKS[_key(book.digests, model.model)] = desk
    return desk


def _controls(lm: LanguageModel) -> tuple[str, ...]:
    """None for a model without a chat template, which has no conversations."""
    try:
        return control_texts(lm)
    except ChatTemplateError:
        return ()


def desk_of(config: Any) -> Desk | None:
    """The desk of an engine; None when it has no plans."""
    settings = settings_of(config)
    if settings is None:
        return None
    return DESKS.get(_key(settings.digests, config.model_config.model)) or open_desk(config)


def _key(digests: dict[str, str], model: str) -> str:
    return f"{model} {sorted(digests.items())}"
