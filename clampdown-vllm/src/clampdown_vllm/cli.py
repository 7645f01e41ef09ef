"""`clampdown-vllm check URL`: does a running server steer? `clampdown-vllm serve`: one that cannot start unsteered.

vLLM goes on without a plugin that it cannot import, or that `VLLM_PLUGINS` leaves out. A server without it does not
list plans, and its replies have no receipts: `check` asks each plan one short question and looks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clampdown.errors import ClampdownError, SteeringNotAppliedError

QUESTION = "What is the capital of Italy?"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exit code 2 for what is wrong with the server or the options."""
    parser = argparse.ArgumentParser(prog="clampdown-vllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="ask a running server whether it steers")
    check.add_argument("url", help="of the server, for example http://127.0.0.1:8000")
    check.add_argument("--api-key", default="")
    serve = commands.add_parser("serve", help="`vllm serve` with plans; every option after the model is vLLM's own")
    serve.add_argument("model")
    serve.add_argument("--plans", action="append", required=True, metavar="PATH")
    serve.add_argument("--sae", action="append", default=[], metavar="NAME")
    serve.add_argument("--audit", metavar="FILE")
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.command == "check":
            _say(checked(known.url.rstrip("/"), known.api_key))
        else:
            _serve(known, rest)
    except ClampdownError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"  hint: {error.hint}\n" if error.hint else ""))
        sys.exit(2)


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def checked(url: str, api_key: str = "") -> list[str]:
    """One line per plan. Raises `SteeringNotAppliedError` for a server that does not steer."""
    models = [model["id"] for model in _ask(f"{url}/v1/models", None, api_key)["data"]]
    plans = [name for name in models if any(name.startswith(f"{base}:") for base in models)]
    if not plans:
        raise SteeringNotAppliedError(
            f"{url} lists no plan: {', '.join(models)}",
            hint="the plugin is not loaded there: is it installed beside vLLM, and not left out by VLLM_PLUGINS?",
        )
    return [f"{name}: {_probe(url, name, api_key)}" for name in plans]


def _probe(url: str, name: str, api_key: str) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
    receipt = _ask(f"{url}/v1/chat/completions", body, api_key).get("steering")
    if not receipt or receipt.get("plan") != name.rpartition(":")[2]:
        raise SteeringNotAppliedError(f"{name} answered without a receipt: nothing says that it was steered")
    if receipt["gate_fired"] is False:
        return f"gate shut (score {receipt['gate_score']:.4g}, threshold {receipt['gate_threshold']:.4g})"
    return f"{receipt['tokens_touched']} tokens changed, mean size {receipt['edit_norm']:.4g}"


def _ask(url: str, body: dict[str, Any] | None, api_key: str) -> dict[str, Any]:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {api_key}"} if api_key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=120) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise SteeringNotAppliedError(
            f"{url} answered {error.code}: {error.read()[:300].decode(errors='replace')}"
        ) from error
    except (URLError, OSError, ValueError) as error:
        raise SteeringNotAppliedError(f"{url} cannot be asked: {error}") from error


def _serve(known: argparse.Namespace, rest: Sequence[str]) -> None:
    """vLLM's own command, in this process, with the plugin put in place before it begins."""
    from clampdown.config import embedded_model
    from clampdown_vllm.plugin import register

    settings = {"plans": [str(Path(p).resolve()) for p in known.plans], "saes": known.sae}
    if known.audit:
        settings["audit"] = str(Path(known.audit).resolve())
    directory = embedded_model(known.model)
    model = [str(directory), "--served-model-name", known.model] if directory else [known.model]
    config = ["--additional-config", json.dumps({"clampdown": settings})]
    sys.argv = ["vllm", "serve", *model, *config, *rest]
    from vllm.entrypoints.cli.main import main as vllm

    register()
    vllm()


if __name__ == "__main__":
    main()
