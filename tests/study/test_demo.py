"""What the demo writes down beside running: where the scores of its choice come from."""

from __future__ import annotations

from clampdown.discovery.causal import clamp_plan
from clampdown.steering.arms import Arm
from clampdown.store import prompts_hash
from clampdown.study.demo import HARMFUL, QUICK, with_gain
from clampdown.study.experiment import organism_subject
from clampdown.study.frontier import Axes
from clampdown.study.strengths import Candidate, Choice, Rule
from clampdown.types import ArmKind, FeatureScore, FeatureSet, Split


def test_the_gain_on_validation_names_the_validation_prompts() -> None:
    subject = organism_subject()
    read = subject.prompts(Split.DISCOVERY, 2, "harmful")
    site = subject.sae.cfg.site.name
    found = FeatureSet("clamp", site, "x", (FeatureScore(3, {"x": 1.0}),), subject.provenance(read))
    arm = Arm("clamp 3", ArmKind.FEATURE, clamp_plan(subject.lm, subject.sae, 3, 1.0))
    choice = Choice(None, (Candidate(arm, Axes(0.5, None, 0.0, None)),), Rule())
    (scored,) = with_gain(subject, [found], choice, QUICK)
    shown = subject.prompts(Split.VALIDATION, QUICK.validation, *HARMFUL)
    source = scored.source("validation_refusal")
    assert (source.provenance.prompts_hash, source.n) == (prompts_hash(shown), len(shown))
    assert scored.source("x").provenance == found.provenance
