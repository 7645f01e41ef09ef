"""A plan's SAE sits where the plan says, whatever its files say: `plan make --site` is for files that say nothing."""

from __future__ import annotations

from pathlib import Path

from clampdown.config import ORGANISM
from clampdown.interop.steered import load_steered
from clampdown.models.loading import load_model
from clampdown.saes.checkpoints import open_sae
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, write_plan
from clampdown.study.loading import load_for
from clampdown.types import Site


def test_every_front_end_loads_the_sae_for_the_plans_site(tmp_path: Path) -> None:
    lm = load_model(ORGANISM)
    own = open_sae(ORGANISM)
    site = Site(own.cfg.site.layer - 1)
    plan = Plan(
        name="elsewhere",
        model=ModelRef(name=lm.name, revision=lm.revision),
        saes=(SaeRef(site=site.name, name=own.name, revision=own.revision),),
        edits=(Edit(site=site.name, operator="add", features=(5,), strengths=(1.0,)),),
    )
    write_plan(tmp_path / "plan.toml", plan)
    _, evaluated = load_for([plan])
    served = load_steered(plan=tmp_path / "plan.toml").saes
    assert [sae.cfg.site for sae in (*evaluated, *served)] == [site] * 2
