"""A judge that is a language model behind an OpenAI-compatible endpoint, with one of the rubrics.

Cases are asked in parallel, never more than the endpoint's `concurrency` at once. A case that the endpoint gave no
answer to waits (no judgement); after three such cases in a row the endpoint counts as dead and the rest wait without
being asked. An answer that the rubric cannot read is unscored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from clampdown.errors import EndpointDownError, EndpointError, JudgeError
from clampdown.evaluation.judges.endpoint import ChatClient, Endpoint
from clampdown.evaluation.judges.interface import Case, Finding, NamedJudge, screened
from clampdown.evaluation.judges.rubrics import RUBRICS, Rubric, air_bench_rubric
from clampdown.types import Judgement, Verdict

_DEAD_AFTER = 3


def llm_judge(endpoint: Endpoint, rubric: Rubric) -> NamedJudge:
    """The judge. Its name holds rubric, model and address: a change of any is another judge."""

    def find(cases: Sequence[Case]) -> Iterator[Finding]:
        with ChatClient(endpoint) as client:
            yield from _find(client, rubric, cases)

    return screened(NamedJudge(f"llm/1:{rubric.name}:{endpoint.model}@{endpoint.url}", find, endpoint.model))


def _find(client: ChatClient, rubric: Rubric, cases: Sequence[Case]) -> Iterator[Finding]:
    """Findings as they come; a queue of at most `concurrency` questions."""
    waiting = list(enumerate(cases))[::-1]
    running: dict[Future[Judgement], int] = {}
    failed = 0
    with ThreadPoolExecutor(client.endpoint.concurrency) as pool:
        while waiting or running:
            while waiting and len(running) < client.endpoint.concurrency and failed < _DEAD_AFTER:
                index, case = waiting.pop()
                running[pool.submit(_judge, client, rubric, case)] = index
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    yield Finding(index, future.result())
                    failed = 0
                except EndpointDownError as error:
                    failed += 1
                    yield Finding(index, None, error.message)
                except EndpointError as error:
                    raise JudgeError(f"the judge cannot be asked: {error.message}", hint=error.hint) from error
            if failed >= _DEAD_AFTER and not running:
                yield from (Finding(index, None, f"not asked: {client.endpoint.url} is down") for index, _ in waiting)
                return


def _judge(client: ChatClient, rubric: Rubric, case: Case) -> Judgement:
    answer = client.complete(rubric.ask(case.prompt, case.reply), max_tokens=rubric.max_tokens)
    found = rubric.parse(answer)
    return found or Judgement(Verdict.UNSCORED, detail=f"the judge said {answer.strip()[-120:]!r}")


def parse_llm(argument: str) -> NamedJudge:
    """RUBRIC:MODEL@URL, or air-bench=FILE:MODEL@URL for the authors' own prompts. Raises `JudgeError`."""
    rubric_name, _, address = argument.partition(":")
    model, mark, url = address.rpartition("@http")
    if not mark or not model:
        raise JudgeError(
            f"'llm:{argument}' does not say which model judges, and there is no default",
            hint=f"llm:RUBRIC:MODEL@URL, RUBRIC one of {', '.join(RUBRICS)}; URL such as https://api.example.com/v1",
        )
    name, _, path = rubric_name.partition("=")
    if name not in RUBRICS or (path and name != "air-bench"):
        raise JudgeError(f"no rubric '{rubric_name}'", hint=f"one of: {', '.join(RUBRICS)}, air-bench=FILE")
    return llm_judge(Endpoint(f"http{url}", model), air_bench_rubric(Path(path)) if path else RUBRICS[name])
