"""The simulated run of the report tests."""

from __future__ import annotations

from tests.reports.conftest import run, run_dir, run_of

__all__ = ["run", "run_dir", "run_of"]
