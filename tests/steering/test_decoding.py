"""Rows that join and leave a decoding batch are steered as in a block of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from clampdown.errors import PlanError, SteeringNotAppliedError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.decoding import Decoding, covers_generated
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.receipts import Seat
from clampdown.steering.scopes import SCOPES

PlanOf = Callable[..., Plan]


def edit(site: str, operator: str = "add", scope: str = "all", feature: int = 3) -> Edit:
    return Edit(site=site, operator=operator, features=(feature,), strengths=(4.0,), scope=scope)


def logits(lm: LanguageModel, tokens: list[int]) -> torch.Tensor:
    return lm.model(input_ids=torch.tensor(tokens)[:, None]).logits


def test_a_scope_covers_what_is_generated_if_it_acts_there(lm: LanguageModel, sae: Sae, plan_of: PlanOf) -> None:
    """Asked of `steer`: a prompt with an assistant header, then one token."""
    for scope in SCOPES:
        plan = plan_of(edit(sae.site.name, scope=scope))
        with steer(lm, plan, sae, require_reach=False) as steering:
            cache = lm.model(input_ids=torch.tensor([[1, 2, 8, 5, 3]]), use_cache=True).past_key_values
            (before,) = steering.receipts()
            lm.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
            (after,) = steering.receipts()
        assert before is not None and after is not None
        assert (after.tokens_touched > before.tokens_touched) == covers_generated(scope)


def test_rows_keep_their_own_plan_branch_and_count(lm: LanguageModel, sae: Sae, plan_of: PlanOf) -> None:
    """Each row against a block with its plan alone, while rows come, go and change places."""
    site = sae.site.name
    plans = [None, plan_of(edit(site)), plan_of(edit(site, "clamp", "generated")), plan_of(edit(site, scope="prompt"))]
    always = plan_of(edit(site, "clamp"))  # in a block of its own a token is a prompt, which 'generated' leaves alone
    shut = Seat(plans[1], acts=(0.0, 0.0), scores=(0.5, 0.0), fired=(False, False))
    decoding = Decoding(lm, lambda _: [sae])

    def alone(plan: Plan | None, token: int) -> torch.Tensor:
        with steer(lm, plan, sae, require_reach=False):
            return logits(lm, [token])[0]

    def assert_steered(acting: list[Plan | None], tokens: list[int]) -> None:
        with decoding.running():
            found = logits(lm, tokens)
        for row, plan, token in zip(found, acting, tokens, strict=True):
            torch.testing.assert_close(row, alone(plan, token), atol=1e-4, rtol=1e-4)

    decoding.join([Seat(plans[1], touched=2.0, norm=0.5), Seat(None), shut])
    assert_steered([plans[1], None, None], [7, 8, 9])
    decoding.join([Seat(plans[2])])
    assert_steered([plans[1], None, None, always], [7, 8, 9, 10])
    decoding.keep_rows(torch.tensor([0, 3]))
    decoding.join([Seat(plans[3])])
    assert_steered([plans[1], always, None], [11, 12, 13])  # 'prompt' does not reach a generated token
    receipts = [decoding.receipt(row) for row in range(3)]
    assert [receipt and receipt.tokens_touched for receipt in receipts] == [5, 2, 0]
    decoding.keep_rows(torch.tensor([1]))
    assert decoding.receipt(0) == receipts[1]


def test_what_is_not_a_step_of_all_rows_is_an_error(lm: LanguageModel, sae: Sae, plan_of: PlanOf) -> None:
    decoding = Decoding(lm, lambda _: [sae])
    decoding.join([Seat(plan_of(edit(sae.site.name)))] * 2)
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            logits(lm, [7, 8])
        except SteeringNotAppliedError as error:
            errors.append(error)

    with decoding.running():
        with pytest.raises(PlanError):
            logits(lm, [7])
        with pytest.raises(PlanError), steer(lm, None):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(errors) == 1, "another thread's pass is not steered with these rows"
    assert torch.isfinite(logits(lm, [7])).all(), "no hook is left"
