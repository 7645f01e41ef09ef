"""The table of judges: a spec such as "rules" or "llm:MODEL@URL" becomes a `NamedJudge`.

A new judge is one file and one row here. What lives in a higher package (the embedded corpus's exact judge) is handed
in as a further row by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clampdown.errors import JudgeError
from clampdown.evaluation.judges.interface import NamedJudge, one_by_one, screened
from clampdown.evaluation.judges.rules import VERSION, rules_verdict
from clampdown.evaluation.judges.strings import prefixes, substrings
from clampdown.types import Judgement, Prompt

DEFAULT = "learned"
"""The judge of natural-language replies where none is named."""

Maker = Callable[[str], NamedJudge]
"""Makes a judge from what follows the colon of its spec ("" without one)."""


def _rules() -> NamedJudge:
    def judge(prompt: Prompt, reply: str) -> Judgement:
        verdict, why = rules_verdict(reply, prompt.text)
        return Judgement(verdict, detail=why)

    return screened(one_by_one(VERSION, judge))


def _learned(argument: str) -> NamedJudge:
    from clampdown.evaluation.judges.learned import learned  # only this judge needs its weights

    return learned(argument)


def _llm(argument: str) -> NamedJudge:
    from clampdown.evaluation.judges.llm import parse_llm  # only this judge needs an HTTP client

    return parse_llm(argument)


def _wildguard(argument: str) -> NamedJudge:
    from clampdown.evaluation.judges.wildguard import wildguard  # only this judge needs torch

    return wildguard(argument)


def _guard(argument: str) -> NamedJudge:
    from clampdown.evaluation.judges.guards import parse_guard  # only this judge needs torch or an HTTP client

    return parse_guard(argument)


def _plain(name: str, make: Callable[[], NamedJudge]) -> Maker:
    """A judge without an argument."""

    def maker(argument: str) -> NamedJudge:
        if argument:
            raise JudgeError(f"the judge '{name}' takes no argument, got '{argument}'", hint=f"--judge {name}")
        return make()

    return maker


JUDGES: dict[str, Maker] = {
    "learned": _learned,
    "rules": _plain("rules", _rules),
    "wildguard": _wildguard,
    "guard": _guard,
    "llm": _llm,
    "substrings": _plain("substrings", substrings),
    "prefixes": _plain("prefixes", prefixes),
}


def make_judge(spec: str, more: Mapping[str, Maker] | None = None) -> NamedJudge:
    """The judge that a spec names: KIND or KIND:ARGUMENT. Raises `JudgeError` for an unknown kind or a bad argument."""
    known = {**JUDGES, **(more or {})}
    kind, _, argument = spec.partition(":")
    if kind not in known:
        raise JudgeError(f"no judge '{kind}'", hint=f"one of: {', '.join(known)}")
    return known[kind](argument)
