"""Loading an SAE: the embedded ones, a directory or file, or a published release, all by one code path.

1. The name becomes a path: the embedded SAE's, the one given, or a download (`catalog`).
2. The format is recognised by its files and read with tensors mapped, not loaded (`formats`).
3. `load_sae` brings everything to the device; `load_feature_view` takes the chosen features' columns and rows only, and
   `open_sae` is an SAE that does so whenever a feature is asked for: what serving a plan needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from clampdown.config import embedded_sae
from clampdown.errors import CheckpointError
from clampdown.saes import saelens
from clampdown.saes.architectures import CENTRED
from clampdown.saes.catalog import Address, check_usable, fetch, find_release, lists_own
from clampdown.saes.formats import Raw, detect
from clampdown.saes.sae import FeatureView, Sae, SaeConfig, check_features, check_finite
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
    folded = _fold(tensors, source.raw)
    check_finite(str(name), folded)
    return replace(sae, tensors=folded, revision=source.revision()).to(device)


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
    scaled = replace(
        view,
        encoder=view.encoder * scale,
        directions=view.directions / scale,
        b_dec=view.b_dec / scale,
        vectors={key: vector.clone() for key, vector in view.vectors.items()},
    )
    check_finite(str(name), {"W_enc": scaled.encoder, "W_dec": scaled.directions, "b_dec": scaled.b_dec})
    check_finite(str(name), scaled.vectors)
    return scaled


@dataclass
class OpenedSae:
    """An SAE on disk: features are read when they are first asked for, and kept.

    One feature costs an encoder column and a decoder row; a top-k SAE costs its whole encoder with the first feature,
    because which features are among the k largest depends on all. Threads may share it.
    """

    name: str
    cfg: SaeConfig
    revision: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    _held: FeatureView | None = field(default=None, repr=False)
    _all: Sae | None = field(default=None, repr=False)
    _reading: Lock = field(default_factory=Lock, repr=False)

    def select(self, features: Sequence[int]) -> FeatureView:
        """As `Sae.select`. Raises `FeatureIndexError`, and `CheckpointError` when the files changed since opening."""
        chosen = check_features(features, self.cfg.d_sae)
        with self._reading:
            held = self._held
            missing = [f for f in dict.fromkeys(chosen) if held is None or f not in held.features]
            if missing or held is None:
                self._check_unchanged()
                new = load_feature_view(self.name, missing, device=self.device, dtype=self.dtype, site=self.cfg.site)
                held = self._held = new if held is None else held.join(new)
        return held.pick(chosen)

    def whole(self) -> Sae:
        """All of it, read once: for edits that drop the SAE's error term."""
        with self._reading:
            if self._all is None:
                self._check_unchanged()
                self._all = load_sae(self.name, device=self.device, dtype=self.dtype, site=self.cfg.site)
        return self._all

    @property
    def bytes_held(self) -> int:
        """What the features that were read occupy."""
        if self._held is None:
            return 0
        tensors = (self._held.directions, self._held.encoder, self._held.b_dec, *self._held.vectors.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def _check_unchanged(self) -> None:
        found = sae_revision(self.name)
        if found != self.revision:
            raise CheckpointError(
                f"the files of SAE '{self.name}' changed while it was open: revision {self.revision} became {found}",
                hint="open it again, and make plans for the new one",
            )


def open_sae(
    name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, site: Site | None = None
) -> OpenedSae:
    """`load_sae` without reading the weights: features are read as they are asked for. Raises as `load_sae`."""
    source = _locate(str(name), few=True)
    return OpenedSae(str(name), _as_stated(source, str(name), site).cfg, source.revision(), device, dtype)


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
        check_usable(release)
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
    sae = Sae(_config(raw, site, address, name), raw.tensors, name)
    unread = sorted(raw.tensors.keys() - {"W_enc", "W_dec", "b_dec", *sae.architecture.vectors})
    if unread:
        raise CheckpointError(
            f"SAE '{name}' holds tensors that are not read: {', '.join(key[:60] for key in unread[:8])}",
            hint=f"they may change what it computes; a {raw.architecture} SAE has none of them",
        )
    return sae


def _config(raw: Raw, site: Site, address: Address | None, name: str) -> SaeConfig:
    shape = raw.shape or tuple(raw.tensors["W_dec"].shape[::-1] if "W_dec" in raw.tensors else ())
    if len(shape) != 2:
        found = ", ".join(sorted(raw.tensors))
        raise CheckpointError(f"SAE '{name}' has no decoder matrix 'W_dec'", hint=f"found: {found}")
    normed = raw.normalize_activations
    return SaeConfig(
        architecture=raw.architecture,  # type: ignore[arg-type]  # readers let only known ones through
        d_in=int(shape[0]),
        d_sae=int(shape[1]),
        site=site,
        apply_b_dec_to_input=raw.apply_b_dec_to_input,
        normalize_activations=CENTRED[normed] if raw.centred else normed,  # type: ignore[arg-type]
        centred=raw.centred,
        k=raw.k,
        model_name=(address.model if address else "") or raw.model_name,
        neuronpedia_id=raw.neuronpedia_id or (address.neuronpedia_id if address else None),
    )


def _fold(tensors: dict[str, Tensor], raw: Raw) -> dict[str, Tensor]:
    """Put constant scales into the weights: x -> x s before and / s after, and activations in decoder-norm units."""
    length = tensors["W_dec"].norm(dim=-1).clamp(min=1e-8) if raw.by_decoder_norm else None
    if raw.input_scale != 1.0:
        scale = raw.input_scale
        tensors |= {
            "W_enc": tensors["W_enc"] * scale,
            "W_dec": tensors["W_dec"] / scale,
            "b_dec": tensors["b_dec"] / scale,
        }
    if length is not None:  # in the units of training: the rows' lengths before the input's scale
        tensors |= {
            "W_enc": tensors["W_enc"] * length,
            "b_enc": tensors["b_enc"] * length,
            "W_dec": tensors["W_dec"] / length[:, None],
        }
    return tensors
