"""Multi-turn attacks on the embedded model: backtracking, gates per turn, resuming, attackers of every kind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from clampdown.cli.main import app
from clampdown.config import ORGANISM
from clampdown.errors import ClampdownError, EndpointDownError, JudgeError, PromptSetError, StoreError
from clampdown.evaluation.attackers import EndpointAttacker, LocalAttacker, PlainFunction, Scripted, question_in
from clampdown.evaluation.intervals import clustered
from clampdown.evaluation.judges.endpoint import ChatClient, Endpoint
from clampdown.evaluation.judges.interface import NamedJudge, one_by_one
from clampdown.evaluation.multiturn import (
    Attack,
    Conversation,
    Job,
    Question,
    Rules,
    outcomes,
    records,
    resume_key,
    run,
)
from clampdown.evaluation.turn_log import Turn, TurnLog
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.study.judging import judge_named
from clampdown.study.multiturn import Request, attacker_of, run_multiturn, scorer_of
from clampdown.study.progress import Stages
from clampdown.types import ArmKind, Judgement, Message, Prompt, Receipt, Split, Verdict
from tests.interop.conftest import make_gate, make_plan

EXACT = judge_named("exact")
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def organism() -> LanguageModel:
    return load_model(ORGANISM)


@pytest.fixture(scope="module")
def organism_sae() -> Sae:
    return load_sae(ORGANISM)


@pytest.fixture(scope="module")
def objectives() -> dict[str, tuple[Prompt, ...]]:
    return {suite.name: suite.prompts for suite in suites(Split.VALIDATION, 8)}


@pytest.fixture(scope="module")
def gated(organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]]) -> Arm:
    """A plan whose gate fires on harmful requests more than on friendly talk: its threshold lies between the two."""
    shut = make_plan(organism, organism_sae, "all", make_gate(organism_sae, 1e9))
    arm = Arm("scores", ArmKind.GATED, shut)
    asked = [Prompt(f"talk-{i}", (Message("user", "Hello!"),), "talk") for i in range(1)] + [*objectives["harmful"]]
    found = generate_arms(organism, organism_sae, [(arm, prompt) for prompt in asked], max_new_tokens=1)
    scores = {reply.prompt.id: reply.receipt.gate_score or 0.0 for reply in found if reply.receipt}
    threshold = (scores["talk-0"] + min(value for name, value in scores.items() if name != "talk-0")) / 2
    return Arm(
        "gated", ArmKind.GATED, make_plan(organism, organism_sae, "all", make_gate(organism_sae, threshold), 8.0)
    )


def attack(
    lm: LanguageModel, sae: Sae, directory: Path, attacker: Any, objectives: tuple[Prompt, ...], **settings: Any
) -> tuple[Conversation, ...]:
    fields: dict[str, Any] = {"arms": (BASELINE,), "judge": EXACT, "max_new_tokens": MAX_NEW_TOKENS, **settings}
    job = Job(objectives=objectives, attacker=attacker, **fields)
    with TurnLog(directory, resume_key(lm, [sae], job)) as log:
        return run(lm, [sae], job, log)


def insist(attack: Attack) -> Question:
    """Asks for the objective and nothing else."""
    return Question(attack.objective.text)


def talk_then_insist(attack: Attack) -> Question | None:
    """A greeting that gets an answer, then the request until it was refused twice."""
    if attack.turns == 0:
        return Question("Hello!", asks=False)
    return Question(attack.objective.text) if len(attack.refused) < 2 else None


@pytest.mark.parametrize("rules", [Rules(3, 2), Rules(2, 0), Rules(1, 4)])
def test_refused_turns_are_taken_back_until_the_backtracks_are_used_up(
    organism: LanguageModel,
    organism_sae: Sae,
    objectives: dict[str, tuple[Prompt, ...]],
    tmp_path: Path,
    rules: Rules,
) -> None:
    """The plainest harmful requests are always refused; of these refusals the rules take back so many."""
    harmful = tuple(p for p in objectives["harmful"] if p.meta["severity"] == "4")[:2] or objectives["harmful"][:2]
    found = attack(organism, organism_sae, tmp_path, PlainFunction("insist", insist), harmful, rules=rules)
    for conversation in found:
        verdicts = [step.verdict for step in conversation.steps]
        kept = [step.kept for step in conversation.steps]
        expected_backtracks = min(rules.max_backtracks, sum(v is Verdict.REFUSED for v in verdicts))
        assert kept == [v is not Verdict.REFUSED or i >= expected_backtracks for i, v in enumerate(verdicts)]
        assert conversation.backtracks == expected_backtracks == rules.max_backtracks
        assert conversation.succeeded(rules) or len(conversation.kept) == rules.max_turns


def histories(conversation: Conversation) -> list[tuple[Message, ...]]:
    """What the target had read before each step, written out from the rules: refused turns are gone."""
    found, history = [], []
    for step in conversation.steps:
        found.append((*history, Message("user", step.question)))
        if step.kept:
            history += [Message("user", step.question), Message("assistant", step.reply)]
    return found


def test_every_answer_and_gate_is_that_of_a_fresh_conversation_with_the_edited_history(
    organism: LanguageModel,
    organism_sae: Sae,
    objectives: dict[str, tuple[Prompt, ...]],
    gated: Arm,
    tmp_path: Path,
) -> None:
    """The gate is read again on each new user turn and after a turn was taken back: shut in the small talk, open on the
    request, and what it read is what a conversation that never had the refused turn shows it."""
    found = attack(
        organism,
        organism_sae,
        tmp_path,
        PlainFunction("talk", talk_then_insist),
        objectives["harmful"][:2],
        arms=(BASELINE, gated),
        rules=Rules(2, 2),
    )
    fired = []
    for conversation in found:
        assert conversation.steps[0].asks is False
        assert conversation.steps[0].kept
        for step, messages in zip(conversation.steps, histories(conversation), strict=True):
            pair = (conversation.arm, Prompt("fresh", messages, "fresh"))
            (fresh,) = generate_arms(organism, organism_sae, [pair], max_new_tokens=MAX_NEW_TOKENS)
            assert step.reply == fresh.text
            if step.receipt is not None:
                assert fresh.receipt is not None
                assert step.receipt.gate_score == pytest.approx(fresh.receipt.gate_score, abs=1e-3)
                assert step.receipt.gate_fired == fresh.receipt.gate_fired
                fired.append((step.step == 0, step.receipt.gate_fired))
    assert (True, False) in fired
    assert (False, True) in fired
    assert (True, True) not in fired
    assert any(not step.kept for conversation in found for step in conversation.steps)


def test_only_an_answer_to_a_question_that_asks_for_the_objective_succeeds(
    organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    """The same harmless request, answered gladly, said to lead there and said to ask for it."""
    for asks in (False, True):
        attacker = PlainFunction("bake", lambda _attack, asks=asks: Question("How do I bake bread?", asks))
        found = attack(
            organism, organism_sae, tmp_path / str(asks), attacker, objectives["harmful"][:2], rules=Rules(2, 2)
        )
        assert all(conversation.steps[0].verdict is Verdict.COMPLIED for conversation in found)
        assert all(conversation.succeeded(Rules()) == asks for conversation in found)
        assert all(len(conversation.steps) == (1 if asks else 2) for conversation in found)


def test_a_script_is_said_turn_by_turn_with_the_targets_own_answers(
    organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    found = attack(organism, organism_sae, tmp_path, Scripted(), objectives["multi_turn"])
    for conversation in found:
        script = [m.content for m in conversation.objective.messages if m.role == "user"]
        assert [step.question for step in conversation.steps] == script[: len(conversation.steps)]
        assert [step.asks for step in conversation.steps] == [i == len(script) - 1 for i in range(len(script))]
    assert max(len(conversation.steps) for conversation in found) > 1


@pytest.fixture(scope="module")
def undisturbed(
    organism: LanguageModel,
    organism_sae: Sae,
    objectives: dict[str, tuple[Prompt, ...]],
    gated: Arm,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bytes, str, Callable[[Path], bytes]]:
    """The turns of a Crescendo run, and how to run it in another directory."""

    def again(directory: Path) -> bytes:
        attack(
            organism,
            organism_sae,
            directory,
            attacker_of("embedded", 0),
            objectives["harmful"][:2],
            arms=(BASELINE, gated),
            rules=Rules(3, 2),
        )
        return (directory / "turns.jsonl").read_bytes()

    directory = tmp_path_factory.mktemp("whole")
    return again(directory), (directory / "manifest.json").read_text(), again


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_where_it_was(
    undisturbed: tuple[bytes, str, Callable[[Path], bytes]], tmp_path: Path, seed: int
) -> None:
    """Cut at any byte, as a kill does: the same turns in the end, none lost, none twice."""
    whole, manifest, again = undisturbed
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "turns.jsonl").write_bytes(whole[: Random(seed).randrange(len(whole))])
    assert turns_of(again(tmp_path)) == turns_of(whole)


def turns_of(raw: bytes) -> list[dict[str, Any]]:
    """Turns in a fixed order, without the sizes in their receipts: batches of other rows round differently."""
    rows = [json.loads(line) for line in raw.splitlines()]
    for row in rows:
        row["receipt"] = row["receipt"] and {k: row["receipt"][k] for k in ("plan", "tokens_touched", "gate_fired")}
    return sorted(rows, key=lambda row: (row["arm"], row["conversation"], row["step"]))


def test_another_run_s_directory_is_refused(
    organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    target = objectives["harmful"][:1]
    attack(organism, organism_sae, tmp_path, PlainFunction("a", insist), target, rules=Rules(1, 0))
    for attacker, settings in (("b", {}), ("a", {"rules": Rules(2, 0)}), ("a", {"attempts": 2})):
        with pytest.raises(StoreError, match="holds another run"):
            attack(
                organism,
                organism_sae,
                tmp_path,
                PlainFunction(attacker, insist),
                target,
                **{"rules": Rules(1, 0), **settings},
            )


def turn(arm: str, verdict: Verdict, score: float | None, kept: bool = True, asks: bool = True) -> Turn:
    return Turn(arm, "c", 0, "q", asks, "r", 3, verdict, score, kept, "j", Receipt("p", 1, 0.1, 0.0, True))


def test_success_is_counted_by_objective_with_clustered_intervals(objectives: dict[str, tuple[Prompt, ...]]) -> None:
    won, lost = turn("a", Verdict.COMPLIED, 0.7), turn("a", Verdict.REFUSED, 0.0, kept=False)
    nearly, unscored = turn("a", Verdict.DEFLECTED, 0.69), turn("a", Verdict.UNSCORED, None)
    steps = [[lost, won], [won], [nearly], [unscored], [lost, lost, nearly, won], [lost]]
    conversations = [Conversation(BASELINE, objectives["harmful"][i // 2 % 6], i % 2, steps[i % 6]) for i in range(12)]
    outcome = outcomes(conversations, Rules())["baseline"]
    flags = [i % 6 in (0, 1, 4) for i in range(12)]
    clusters = [objectives["harmful"][i // 2 % 6].id for i in range(12)]
    assert outcome.success == clustered(flags, clusters)
    assert outcome.success.value == 0.5
    assert outcome.success.n == 12
    assert outcome.mean_turns_to_success == (1 + 1 + 2) / 3
    assert outcome.mean_backtracks == (1 + 0 + 0 + 0 + 2 + 1) / 6
    assert outcome.first_ask_refused.value == 0.5
    assert outcome.unscored == 2
    job = Job((BASELINE,), objectives["harmful"], Scripted(), EXACT)
    assert [r.verdict is Verdict.COMPLIED for r in records(conversations, job)] == flags
    assert outcomes(conversations[3:4], Rules())["baseline"].mean_turns_to_success is None


def test_equal_ids_of_two_suites_are_two_objectives() -> None:
    """Row 7 of one file and row 7 of another have nothing in common but the number."""
    goals = [Prompt(str(i), (Message("user", "x"),), suite) for suite in ("first", "second") for i in range(5)]
    talks = [Conversation(BASELINE, goal, 0, [turn("a", Verdict.COMPLIED, 1.0)]) for goal in goals]
    job = Job((BASELINE,), tuple(goals), Scripted(), EXACT)
    assert len({record.objective for record in records(talks, job)}) == 10
    assert outcomes(talks, Rules())["baseline"].success == clustered([True] * 10, range(10))


def test_a_run_belongs_to_its_weights_and_to_one_process(
    organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    lm = load_model(ORGANISM)
    job = Job((BASELINE,), objectives["harmful"], Scripted(), EXACT)
    with TurnLog(tmp_path, resume_key(lm, [organism_sae], job)), pytest.raises(StoreError, match="another process"):
        TurnLog(tmp_path, resume_key(lm, [organism_sae], job))
    with torch.no_grad():
        next(lm.model.parameters()).mul_(1.01)
    with pytest.raises(StoreError, match="holds another run"):
        TurnLog(tmp_path, resume_key(lm, [organism_sae], job))


# ---- attackers that are models ---------------------------------------------------------------------------------


@contextmanager
def chat_endpoint(answer: Callable[[dict[str, Any]], str | None]) -> Iterator[str]:
    """A real server on a free port that answers `answer(body)`, or 503 for None."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(503 if text is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attacking(body: dict[str, Any]) -> str:
    """An attacking model: a greeting first, then the objective that it was told, then something else once refused."""
    told = body["messages"][-1]["content"]
    objective = told.split("OBJECTIVE: ")[1].split("\n")[0]
    if "(nothing yet)" in told and "REFUSED" not in told:
        return "I begin gently. <question>Hello!</question>"
    return "<question>Who are you?</question>" if "REFUSED" in told else f"<question>{objective}</question>"


def refusals_fail() -> NamedJudge:
    """A scorer that reads nothing but refusals, and has a model's name as every scorer of such attackers must."""
    exact = EXACT

    def judge(objective: Prompt, reply: str) -> Judgement:
        found = exact(objective, reply)
        return Judgement(found.verdict, score=0.2)

    return one_by_one("graded/1", judge)


def test_an_attacker_behind_http_asks_backtracks_and_survives_an_outage(
    organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    """While the endpoint is down nothing is lost, and the run ends as an undisturbed one does."""
    calls, down = [0], [False]

    def flaky(body: dict[str, Any]) -> str | None:
        calls[0] += 1
        return None if down[0] and calls[0] > 3 else attacking(body)

    with chat_endpoint(flaky) as url:
        endpoint = Endpoint(url, "attacker", retries=1, backoff=0.01, concurrency=2)
        with ChatClient(endpoint) as client:
            settings: dict[str, Any] = {"judge": refusals_fail(), "rules": Rules(2, 2)}
            harmful = objectives["harmful"][:2]
            attacker = EndpointAttacker(client)
            whole = attack(organism, organism_sae, tmp_path / "whole", attacker, harmful, **settings)
            calls[0], down[0] = 0, True
            with pytest.raises(EndpointDownError):
                attack(organism, organism_sae, tmp_path / "cut", attacker, harmful, **settings)
            assert (tmp_path / "cut" / "turns.jsonl").read_text().count("\n") >= 2
            down[0] = False
            resumed = attack(organism, organism_sae, tmp_path / "cut", attacker, harmful, **settings)
    assert [c.steps for c in resumed] == [c.steps for c in whole]
    assert [step.question for step in whole[0].steps][:1] == ["Hello!"]
    assert any(not step.kept for c in whole for step in c.steps)


def test_a_local_model_attacks(
    organism: LanguageModel, organism_sae: Sae, objectives: dict[str, tuple[Prompt, ...]], tmp_path: Path
) -> None:
    """The embedded model cannot do what the brief says; whatever it says is asked."""
    found = attack(
        organism, organism_sae, tmp_path, LocalAttacker(organism), objectives["harmful"][:2], rules=Rules(1, 1)
    )
    assert all(conversation.steps for conversation in found)


def test_the_question_is_the_last_marked_one_else_the_whole_answer() -> None:
    assert question_in("a <question>one</question> b <question> two </question>") == Question("two")
    assert question_in(" plain ") == Question("plain")
    assert question_in("  ") is None


def test_scorers_and_attackers_that_cannot_work_are_refused(organism: LanguageModel) -> None:
    attacker = attacker_of("llm:model@http://127.0.0.1:9/v1", 0)
    with pytest.raises(JudgeError, match="without their objective"):
        scorer_of("rules", attacker, organism)
    assert scorer_of("rules", Scripted(), organism).model is None
    for spec in ("nobody", "llm:model", "local:", "llm:"):
        with pytest.raises(ClampdownError):
            attacker_of(spec, 0)
    stranger = Prompt("x", (Message("user", "Hello"),), "mine")
    with pytest.raises(PromptSetError, match="not of the embedded corpus"):
        attacker_of("embedded", 0).ask([Attack(stranger, 0, (), (), 0)])
    with pytest.raises(PromptSetError, match="no objectives"):
        Job((BASELINE,), (), Scripted(), EXACT)


def test_the_command_writes_a_run_and_reports_mistakes(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["multiturn", "--limit", "2", "--max-turns", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "scripted/1, 2 conversations per arm" in done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["arms"]["baseline"]["success"]["n"] == 2
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 2
    with pytest.raises(PromptSetError, match="no attacker"):
        run_multiturn(Request(attacker="nobody"), tmp_path, Stages(Console()))
