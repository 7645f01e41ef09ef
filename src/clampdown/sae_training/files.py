"""Writing an SAE as SAELens writes it, in 16 bit, with a card that says what it is and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from clampdown.documents import read_object
from clampdown.saes.sae import Sae
from clampdown.store import write_atomic, write_json

WEIGHTS, CONFIG, CARD, PAGE = "sae_weights.safetensors", "cfg.json", "card.json", "README.md"


def write_trained(sae: Any, directory: Path, dtype: torch.dtype) -> None:
    """A trained SAE of SAELens, by its own inference format, in `dtype`."""
    written, _ = sae.save_inference_model(directory)
    config = read_object(directory / CONFIG)
    _write(directory, load_file(written), config, dtype)


def write_moved(sae: Sae, directory: Path, dtype: torch.dtype, facts: Mapping[str, Any]) -> None:
    """An SAE that is in memory, pointwise kinds as JumpReLU, ReLU or gated, under SAELens's names."""
    config = {
        "architecture": {"relu": "standard", "batchtopk": "jumprelu"}.get(sae.cfg.architecture, sae.cfg.architecture),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": sae.cfg.site.name, **facts},
    }
    if sae.cfg.centred:
        config["metadata"] |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    if sae.cfg.architecture == "topk":
        config |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, dict(sae.tensors), config, dtype)


def _write(directory: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> None:
    stored = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_atomic(directory / WEIGHTS, save(stored, metadata={"format": "pt"}))
    write_json(directory / CONFIG, config)


def write_card(directory: Path, card: Mapping[str, Any]) -> None:
    """The numbers as JSON, and a page that shows them."""
    write_json(directory / CARD, card)
    write_atomic(directory / PAGE, page(card))


def page(card: Mapping[str, Any]) -> str:
    """The card as Markdown: what it was trained on and how, and what it does."""
    about, rows = card["sae"], "\n".join(f"| {name} | {value} |" for name, value in measured_rows(card))
    mix = "\n".join(f"| {name} | {row['texts']:,} | {row['tokens']:,} |" for name, row in card.get("text", {}).items())
    lines = [
        f"# SAE of {about['model']}, {about['site']}",
        "",
        f"{about['features']:,} features over {about['d_model']} dimensions, kind {about['kind']}, model revision "
        f"`{about['model_revision']}`. Made by `clampdown sae train`; `card.json` holds every number.",
        "",
        "| measured | |",
        "|---|---|",
        rows,
    ]
    if mix:
        lines += ["", "| text | texts | tokens |", "|---|---|---|", mix]
    return "\n".join(lines) + "\n"


def measured_rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The card's measurements as (name, value), in the order in which they are read."""
    rows: list[tuple[str, str]] = []
    if found := card.get("fit"):
        rows += [
            ("FVU, held out", f"{found['fvu']:.3f} ({found['tokens']:,} tokens)"),
            ("features per token", f"{found['l0']:.1f}"),
            ("dead features", f"{found['dead']:.2%} (silent on {found['fired_on']:,} tokens)"),
            ("rare features", f"{found['rare']:.2%} (on fewer than 1 token in 10,000)"),
        ]
    if found := card.get("predictions"):
        recovered = "n/a" if found["recovered"] is None else f"{found['recovered']:.3f}"
        rows += [
            ("cross-entropy", f"{found['ce']:.3f}, reconstructed {found['ce_reconstructed']:.3f}, zeroed "
             f"{found['ce_zeroed']:.3f} nats ({found['tokens']:,} tokens)"),
            ("cross-entropy recovered", recovered),
        ]  # fmt: skip
    if found := card.get("refusals"):
        correlation = "n/a" if found["correlation"] is None else f"{found['correlation']:.3f}"
        rows += [
            ("refusal log-odds", f"{found['untouched']:+.2f}, reconstructed {found['reconstructed']:+.2f} nats "
             f"({found['requests']} requests)"),
            ("their correlation; same side", f"{correlation}; {found['same_side']:.2f}"),
        ]  # fmt: skip
    elif "refusals" in card:
        rows.append(("refusal log-odds", "n/a: the model refused none of the requests"))
    return rows
