"""The judges that a command can name, the embedded corpus's exact judge among them."""

from __future__ import annotations

from clampdown.errors import JudgeError
from clampdown.evaluation.judges.interface import NamedJudge, one_by_one
from clampdown.evaluation.judges.table import make_judge

EXACT = "organism-exact/1"


def judge_named(spec: str) -> NamedJudge:
    """As `make_judge`, with `exact` for replies of the embedded model. Raises `JudgeError`."""
    return make_judge(spec, {"exact": _exact})


def _exact(argument: str) -> NamedJudge:
    from clampdown.organism.judge import judge

    if argument:
        raise JudgeError(f"the exact judge takes no argument, got '{argument}'", hint="--judge exact")
    return one_by_one(EXACT, judge)
