"""Loading an SAE: the embedded ones, a directory or file, or a published release, all by one code path.

1. The name becomes a path: the embedded SAE's, the one given, or a download (`catalog`).
2. The format is recognised by its files and read with tensors mapped, not loaded (`formats`).
3. `load_sae` brings everything to the device; `load_feature_view` takes the chosen features' columns and rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clampdown.config import embedded_sae
from clampdown.errors import CheckpointError
from clampdown.saes import saelens
from clampdown.saes.catalog import Address, fetch, find_release, lists_own
from clampdown.saes.formats import Raw, detect
from clampdown.saes.sae import FeatureView, Sae, SaeConfig
from clampdown.store import content_hash, files_revision
from clampdown.types import Site


def load_sae(
    name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, site: Site | None = None
) -> Sae:
    """Load "organism", "organism:x8", a directory or file, or "release:id". `site` overrides what the files say.

    Raises `CheckpointError` for missing or malformed files, `PickleCheckpointError` for files that would run code,
    `SaeError` for kinds that cannot be steered, `SiteError` for places that are no site.
    """
    source = _locate(str(name), few=False)
    sae = _as_stated(source, str(name), site)
    tensors = {key: tensor.to(dtype, copy=True) for key, tensor in sae.tensors.items()}
    return replace(sae, tensors=_fold(tensors, source.raw), revision=source.revision()).to(device)


def load_feature_view(
    name: str | Path,
    features: Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    site: Site | None = None,
) -> FeatureView:
    """`load_sae(name).select(features)` without reading the rest of the file.

    Reads one decoder row and one encoder column per feature; a top-k SAE needs its whole encoder. Raises as `load_sae`,
    and `FeatureIndexError`.
    """
    source = _locate(str(name), few=True)
    if source.raw.by_decoder_norm:  # the norms of all decoder rows decide: nothing to be gained
        return load_sae(name, device=device, dtype=dtype, site=site).select(features)
    view = _as_stated(source, str(name), site).select(features).to(device, dtype)
    scale = source.raw.input_scale
    return replace(
        view,
        encoder=view.encoder * scale,
        directions=view.directions / scale,
        b_dec=view.b_dec / scale,
        vectors={key: vector.clone() for key, vector in view.vectors.items()},
    )


def sae_revision(name: str | Path) -> str:
    """What `load_sae(name).revision` would be, reading at most 64 MiB: for checking a plan before serving from it."""
    return _locate(str(name), few=True).revision()


@dataclass(frozen=True, slots=True)
class _Source:
    """What the files of an SAE say, which files they are, and its address when it is a published one."""

    raw: Raw
    files: tuple[Path, ...]
    address: Address | None = None
    identity: str = ""

    def revision(self) -> str:
        return files_revision(self.files) if self.files else content_hash(self.identity)


def _locate(name: str, *, few: bool) -> _Source:
    """Find and read an SAE by name, with its tensors mapped. `few`: only a few features will be taken."""
    release, _, sae_id = name.partition(":")
    embedded = embedded_sae(name)
    if embedded is not None and not embedded.is_dir():
        known = ", ".join(sorted(p.name.replace("sae-", "organism:") for p in embedded.parent.glob("sae-*")))
        raise CheckpointError(f"there is no embedded SAE '{name}'", hint=f"there are: {known or 'none installed'}")
    path, address = embedded or Path(name), None
    if not path.exists():
        if sae_id and not lists_own(release) and saelens.lists_release(release):
            return _Source(saelens.read_release(release, sae_id), (), None, name)
        address = find_release(name)
        if address is None:
            raise CheckpointError(
                f"no SAE at '{name}': no such file, directory or release",
                hint="give 'organism', a directory, a release such as llama-3-8b-it-res-jh:blocks.25.hook_resid_post, "
                "or a hub repository and path, org/repo:path",
            )
        path = fetch(address)
    found = detect(path)
    weights = (path,) if path.is_file() else tuple(path / file for file in (*found.files, *found.optional))
    return _Source(found.read(path, few), weights, address)


def _as_stated(source: _Source, name: str, site: Site | None) -> Sae:
    """The SAE as its files state it: tensors mapped, in the file's dtype, nothing folded in yet."""
    raw, address = source.raw, source.address
    if site is None:
        if raw.hook_name is None:
            raise CheckpointError(f"the files of SAE '{name}' do not say where it sits", hint="pass its site")
        site = Site.parse(raw.hook_name)
    return Sae(_config(raw, site, address, name), raw.tensors, name)


def _config(raw: Raw, site: Site, address: Address | None, name: str) -> SaeConfig:
    shape = raw.shape or tuple(raw.tensors["W_dec"].shape[::-1] if "W_dec" in raw.tensors else ())
    if len(shape) != 2:
        found = ", ".join(sorted(raw.tensors))
        raise CheckpointError(f"SAE '{name}' has no decoder matrix 'W_dec'", hint=f"found: {found}")
    return SaeConfig(
        architecture=raw.architecture,  # type: ignore[arg-type]  # readers let only known ones through
        d_in=int(shape[0]),
        d_sae=int(shape[1]),
        site=site,
        apply_b_dec_to_input=raw.apply_b_dec_to_input,
        normalize_activations=raw.normalize_activations,  # type: ignore[arg-type]
        k=raw.k,
        model_name=(address.model if address else "") or raw.model_name,
        neuronpedia_id=raw.neuronpedia_id or (address.neuronpedia_id if address else None),
    )


def _fold(tensors: dict[str, Tensor], raw: Raw) -> dict[str, Tensor]:
    """Put constant scales into the weights: x -> x s before and / s after, and activations in decoder-norm units."""
    if raw.input_scale != 1.0:
        scale = raw.input_scale
        tensors |= {
            "W_enc": tensors["W_enc"] * scale,
            "W_dec": tensors["W_dec"] / scale,
            "b_dec": tensors["b_dec"] / scale,
        }
    if raw.by_decoder_norm:
        norm = tensors["W_dec"].norm(dim=-1)
        tensors |= {
            "W_enc": tensors["W_enc"] * norm,
            "b_enc": tensors["b_enc"] * norm,
            "W_dec": tensors["W_dec"] / norm[:, None],
        }
    return tensors
