"""What the sweep writes down beside running: where the scores of its choice come from."""

from __future__ import annotations

import io

from rich.console import Console

from clampdown.config import ORGANISM
from clampdown.store import prompts_hash
from clampdown.study.finding import Found, with_gains
from clampdown.study.groundwork import Groundwork
from clampdown.study.progress import Stages
from clampdown.study.sizes import QUICK
from clampdown.study.study import make_study
from clampdown.study.sweeping import choosing_suites
from clampdown.types import FeatureScore, FeatureSet, PromptRole, Split


def test_the_gain_on_validation_names_the_validation_prompts() -> None:
    study = make_study(ORGANISM, ORGANISM)
    ground = Groundwork(study, QUICK, Stages(Console(file=io.StringIO())))
    read = study.prompts(Split.DISCOVERY, 2, PromptRole.HARMFUL)
    found = FeatureSet("clamp", study.site.name, "x", (FeatureScore(3, {"x": 1.0}),), study.provenance(read))
    shown = [prompt for suite in choosing_suites(ground) for prompt in suite.prompts]
    (scored,) = with_gains(ground, Found((found,)), {3: 0.5}, shown).feature_sets
    source = scored.source("validation_refusal")
    assert (source.provenance.prompts_hash, source.n) == (prompts_hash(shown), len(shown))
    assert scored.source("x").provenance == found.provenance
