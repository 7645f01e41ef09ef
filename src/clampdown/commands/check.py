"""`clampdown check`: does this plan steer this model, shown before anybody relies on it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from clampdown.errors import SteeringNotAppliedError
from clampdown.models.loading import load_model
from clampdown.saes.checkpoints import open_sae
from clampdown.steering.plan import read_plan
from clampdown.steering.program import check_plan
from clampdown.steering.selftest import Check, self_test
from clampdown.types import Site


def run_checks(plan_file: Path, model: str | None, sae: str | None) -> tuple[Check, ...]:
    """The self-test of a plan on a model. Raises `PlanMismatchError` when it was made for something else."""
    plan = read_plan(plan_file)
    lm = load_model(model or plan.model.name)
    saes = [open_sae(sae or ref.name, device=str(lm.device), site=Site.parse(ref.site)) for ref in plan.saes]
    check_plan(plan, lm, {opened.cfg.site.name: opened for opened in saes})
    return self_test(lm, plan, saes)


def show(checks: tuple[Check, ...], console: Console) -> None:
    """Print the table. Raises `SteeringNotAppliedError` when a check did not hold."""
    table = Table("check", "", "figure")
    for check in checks:
        table.add_row(check.name, "[green]ok[/green]" if check.passed else "[bold red]failed[/bold red]", check.detail)
    console.print(table)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise SteeringNotAppliedError(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
