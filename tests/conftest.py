"""Conditions that every test runs under: checked types and shapes, one thread, no network, fixed examples."""

from __future__ import annotations

import os

from hypothesis import settings
from jaxtyping import install_import_hook

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
install_import_hook(
    "clampdown",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "hint_overrides=beartype.FrozenDict({__import__('typing').Self: object})))",
)

# No deadline, because the first call of a kernel is slow; derandomized, so that a red test is red for everyone.
settings.register_profile("clampdown", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("clampdown")
