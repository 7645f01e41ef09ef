"""What `import clampdown as cd` offers: light until used, plain strings as prompts, objects or names, no clashes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import clampdown as cd
from clampdown.errors import ClampdownError, PromptSetError, StrengthError
from clampdown.steering.plan import write_plan
from clampdown.types import Message


def test_importing_loads_nothing_heavy_and_names_are_the_faces() -> None:
    code = (
        "import sys, clampdown as cd; heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    from clampdown import face

    for module in ("study.run", "steering.plan"):  # a package's modules stand beside its names
        importlib.import_module(f"clampdown.{module}")
    assert all(getattr(cd, name) is getattr(face, name) for name in cd.__all__)
    with pytest.raises(AttributeError):
        _ = cd.nothing


def test_strings_are_prompts_and_the_enclosing_block_steers_every_one(tmp_path: Path) -> None:
    lm, sae = cd.load("organism"), cd.load_sae("organism")
    plan = cd.clamp(lm, sae, 352, 126.0, scope="prompt")
    asked = ["Hi", "2 + 2?", "What is the capital city of Spain?"]
    plain = cd.generate(lm, asked)
    write_plan(tmp_path / "plan.toml", plan)
    for given in (plan, tmp_path / "plan.toml"):
        with cd.steer(lm, given) as s:
            steered = cd.generate(lm, asked)
        assert len(s.receipts()) == 3 and all(receipt.tokens_touched for receipt in s.receipts())
        alone = []
        for text in asked:
            with cd.steer(lm, plan):
                alone += cd.generate(lm, text)
        assert [reply.text for reply in steered] == [reply.text for reply in alone]
    assert [reply.text for reply in steered] != [reply.text for reply in plain]
    (conversation,) = cd.generate(lm, [Message("user", "Hi")])
    assert conversation.text == plain[0].text
    with cd.steer(lm, [None, plan, None]):
        mixed = cd.generate(lm, asked)
    assert [mixed[0].text, mixed[1].text] == [plain[0].text, steered[1].text]


def test_a_strength_in_a_features_own_unit_needs_no_prompts_when_it_was_found() -> None:
    lm, sae, data = cd.load("organism"), cd.load_sae("organism"), cd.data("organism")
    found = cd.find(lm, sae, data, "contrast", size="quick")
    best = found[0]
    (edit,) = cd.clamp(lm, sae, best, "2max").edits
    assert edit.strengths == (2 * best.scores["max_activation"],)
    (added,) = cd.add(lm, sae, [best, found[1]], "0.5p99").edits
    assert (added.operator, added.scope, len(added.features)) == ("add", "all", 2)
    assert "51" not in repr(found)[:3] and len(repr(found)) < 500


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda lm, sae: cd.clamp(lm, sae, 10**6, 1.0), ClampdownError),
        (lambda lm, sae: cd.clamp(lm, sae, 3, "much"), StrengthError),
        (lambda lm, sae: cd.data("nothing"), PromptSetError),
        (lambda lm, sae: cd.data(), PromptSetError),
        (lambda lm, sae: cd.find(lm, sae, cd.data("organism"), "magic", size="quick"), PromptSetError),
    ],
)
def test_what_is_wrong_is_named(wrong, error: type[Exception]) -> None:
    with pytest.raises(error):
        wrong(cd.load("organism"), cd.load_sae("organism"))
