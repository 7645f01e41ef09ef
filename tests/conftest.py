"""Conditions that every test runs under: checked types and shapes, one thread, no network, fixed examples."""

from __future__ import annotations

import gc
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.checked import checked

ROOT = Path(__file__).parents[1]

# Before torch and the hub client are imported, which read these once. One thread: the models are so small that torch's
# threads cost more than they give, and pytest-xdist runs two processes. No network: a test that needs one is a mistake,
# and offline the hub client fails at once instead of waiting. Subprocesses inherit all of it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# Every annotated type and tensor shape of the package is checked at every call while the tests run. The hook wants the
# checker as an expression. Its two exceptions: an int is a float (PEP 484), and `Self` is anything, because the hook
# decorates methods one by one and beartype can resolve `Self` only for whole classes.
jaxtyping.jaxtyped = checked  # type: ignore[assignment]  (what the hook puts around functions and dataclasses)
jaxtyping.install_import_hook(
    "clampdown",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "violation_type=__import__('jaxtyping').TypeCheckError, "
    "hint_overrides=beartype.FrozenDict({__import__('typing').Self: object})))",
)

# No deadline and nothing that is too slow: the first call of a kernel is slow, and so is a busy machine. Derandomized,
# so that a red test is red for everyone.
settings.register_profile(
    "clampdown", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, print_blob=True
)
settings.load_profile("clampdown")


# Groups of tests that take longest, first: a process that begins one of them at the end keeps the other waiting.
LONGEST = ("peers", "studio", "tests/test_notebooks.py", "tests/study/test_golden.py", "tests/serving/test_api.py")


class ByFile(LoadScopeScheduling):
    """Which tests one process does together: those of a file, whose fixtures are then made once, and those of all files
    of an `xdist_group`, which import the same large packages. The plugin's own grouping does nothing under pytest 9.2:
    it writes a name that pytest does not read any more."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


@cache
def group_of(file: str) -> str:
    named = re.search(r'xdist_group\("(\w+)"\)', (ROOT / file).read_text(encoding="utf-8"))
    return named[1] if named else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False  # as collected
    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays, and the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(group_of(item.nodeid.partition("::")[0]), len(ranks)))
