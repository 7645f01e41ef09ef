"""A sparse autoencoder as a value: encode, decode, and the sparse view that steering uses.

The sparse path (methods.md 2): an edit that keeps the error term needs only the chosen features' encoder columns and
decoder rows, so reading costs O(d_in * features), not O(d_in * d_sae). It is exact for every pointwise architecture;
a top-k SAE needs the whole pre-activation row to know whether a feature is among the k largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import CheckpointError, FeatureIndexError, SaeError, SiteError, WidthMismatchError
from clampdown.saes.architectures import ARCHITECTURES, NORMALIZATIONS, Architecture, InputNorm
from clampdown.types import Site

ArchitectureName = Literal["relu", "jumprelu", "topk", "batchtopk", "gated"]
Normalization = Literal[
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "centred",
    "centred_constant_norm_rescale",
]


@dataclass(frozen=True, slots=True)
class SaeConfig:
    """What an SAE is: its maths, where it sits, and what it was trained on.

    `apply_b_dec_to_input`: the decoder's bias is subtracted from the input. `k`: features kept by a top-k SAE.
    `centred`: trained on a residual stream without its mean, which a model has that normalises by LayerNorm.
    `neuronpedia_id`: `<model>/<layer>-<set>`, the address of its features' pages, when known.
    """

    architecture: ArchitectureName
    d_in: int
    d_sae: int
    site: Site
    apply_b_dec_to_input: bool = True
    normalize_activations: Normalization = "none"
    k: int = 0
    model_name: str = ""
    neuronpedia_id: str | None = None
    centred: bool = False


def check_features(features: Sequence[int], d_sae: int) -> tuple[int, ...]:
    """The features as plain ints. Raises `FeatureIndexError` for one outside [0, d_sae)."""
    checked = tuple(int(f) for f in features)
    for feature in checked:
        if not 0 <= feature < d_sae:
            raise FeatureIndexError(
                f"feature {feature} does not exist: the SAE has {d_sae} features",
                hint=f"features are counted from 0 to {d_sae - 1}",
            )
    return checked


@dataclass(frozen=True)
class FeatureView:
    """A few features of an SAE: all that steering and gating need.

    `encoder` holds the encoder columns that `read` needs: the chosen ones, or all of them for top-k.
    """

    cfg: SaeConfig
    features: tuple[int, ...]
    directions: Float[Tensor, "n d_in"]
    encoder: Float[Tensor, "d_in read"]
    vectors: Mapping[str, Float[Tensor, " read"]]
    b_dec: Float[Tensor, " d_in"]

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.cfg.architecture]

    def read(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... n"]:
        """Exact activations of just these features at x, in the SAE's dtype."""
        normed = self._norm(x).normed
        product = _centre(normed, self.b_dec, self.cfg) @ self.encoder
        activations = self.architecture.activate(product, self.vectors, self.cfg.k)
        return activations if self.architecture.pointwise else activations[..., list(self.features)]

    def write(self, coefficients: Float[Tensor, "... n"], x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """What adding `coefficients` to the code of x adds to the decoded output, in the SAE's dtype."""
        delta = coefficients.to(self.directions.dtype) @ self.directions
        if self.cfg.normalize_activations in ("none", "expected_average_only_in"):
            return delta
        return self._norm(x).scaled(delta)

    def pick(self, features: Sequence[int]) -> FeatureView:
        """The view of some of this view's features, in the order given. Raises `FeatureIndexError` for any other."""
        missing = [feature for feature in features if feature not in self.features]
        if missing:
            raise FeatureIndexError(f"features {missing} are not among those that were read: {list(self.features)}")
        rows = [self.features.index(feature) for feature in features]
        read = rows if self.architecture.pointwise else slice(None)
        return replace(
            self,
            features=tuple(features),
            directions=self.directions[rows],
            encoder=self.encoder[:, read].contiguous(),
            vectors={name: vector[read] for name, vector in self.vectors.items()},
        )

    def join(self, other: FeatureView) -> FeatureView:
        """The view of both views' features; both must be of the same SAE."""
        joined = replace(
            self, features=self.features + other.features, directions=torch.cat([self.directions, other.directions])
        )
        if not self.architecture.pointwise:
            return joined
        vectors = {name: torch.cat([vector, other.vectors[name]]) for name, vector in self.vectors.items()}
        return replace(joined, encoder=torch.cat([self.encoder, other.encoder], dim=1), vectors=vectors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FeatureView:
        return replace(
            self,
            directions=self.directions.to(device, dtype),
            encoder=self.encoder.to(device, dtype),
            vectors={name: vector.to(device, dtype) for name, vector in self.vectors.items()},
            b_dec=self.b_dec.to(device, dtype),
        )

    def _norm(self, x: Tensor) -> InputNorm:
        return NORMALIZATIONS[self.cfg.normalize_activations](x.to(self.encoder.dtype))


def _centre(x: Tensor, b_dec: Tensor, cfg: SaeConfig) -> Tensor:
    return x - b_dec if cfg.apply_b_dec_to_input else x


@runtime_checkable
class FeatureSource(Protocol):
    """What steering needs of an SAE: what it is, and views of a few of its features. `whole` is for the one thing that
    needs all of it, an edit that drops the error term."""

    @property
    def cfg(self) -> SaeConfig: ...

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def select(self, features: Sequence[int]) -> FeatureView: ...

    def whole(self) -> Sae: ...


@dataclass(frozen=True)
class Sae:
    """A loaded SAE. `tensors` holds W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_dec [d_in] and the vectors [d_sae]
    that its architecture needs. `revision` is a hash of what it was read from.

    Raises `CheckpointError` when a tensor is missing or has the wrong shape, or a top-k SAE does not say its k.
    """

    cfg: SaeConfig
    tensors: Mapping[str, Tensor]
    name: str = "sae"
    revision: str = field(default="unknown")

    def __post_init__(self) -> None:
        if self.cfg.architecture == "topk" and self.cfg.k < 1:
            raise CheckpointError(
                f"SAE '{self.name}': nothing says how many features its top-k keeps, so none would ever be active",
                hint="some formats say it in the name of a directory or repository: keep that name",
            )
        expected = {
            "W_enc": (self.cfg.d_in, self.cfg.d_sae),
            "W_dec": (self.cfg.d_sae, self.cfg.d_in),
            "b_dec": (self.cfg.d_in,),
            **{vector: (self.cfg.d_sae,) for vector in self.architecture.vectors},
        }
        for tensor_name, shape in expected.items():
            if tensor_name not in self.tensors:
                raise CheckpointError(
                    f"SAE '{self.name}': a {self.cfg.architecture} SAE needs '{tensor_name}', which is missing",
                    hint=f"found: {', '.join(sorted(self.tensors))}",
                )
            tensor = self.tensors[tensor_name]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"SAE '{self.name}': '{tensor_name}' has shape {tuple(tensor.shape)}, expected {shape}"
                )
            if not tensor.is_floating_point():
                raise CheckpointError(f"SAE '{self.name}': '{tensor_name}' is {tensor.dtype}: weights are real numbers")

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.cfg.architecture]

    @property
    def site(self) -> Site:
        return self.cfg.site

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.tensors["W_enc"]

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.tensors["W_dec"]

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        return self.tensors["b_dec"]

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.architecture.vectors}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Sae:
        return replace(self, tensors={name: t.to(device, dtype) for name, t in self.tensors.items()})

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations at x, in the SAE's dtype. Raises `WidthMismatchError` for another width."""
        if x.shape[-1] != self.cfg.d_in:
            raise WidthMismatchError(f"SAE '{self.name}' reads vectors of {self.cfg.d_in} values, got {x.shape[-1]}")
        normed = self._norm(x).normed
        product = _centre(normed, self.b_dec, self.cfg) @ self.W_enc
        return self.architecture.activate(product, self._vectors, self.cfg.k)

    def decode(
        self, code: Float[Tensor, "... d_sae"], x: Float[Tensor, "... d_in"] | None = None
    ) -> Float[Tensor, "... d_in"]:
        """The residual that a code stands for. An SAE that normalises its input at run time needs the input `x` to
        undo that; raises `SaeError` without it."""
        decoded = code @ self.W_dec + self.b_dec
        if self.cfg.normalize_activations in ("none", "expected_average_only_in"):
            return decoded
        if x is None:
            raise SaeError(f"SAE '{self.name}' normalises its input: decode(code, x) needs the input to undo that")
        return self._norm(x).undo(decoded)

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x), x)

    def select(self, features: Sequence[int]) -> FeatureView:
        """The sparse view of a few features. Raises `FeatureIndexError` for one outside the SAE."""
        chosen = check_features(features, self.cfg.d_sae)
        read = list(chosen) if self.architecture.pointwise else slice(None)
        return FeatureView(
            cfg=self.cfg,
            features=chosen,
            directions=self.W_dec[list(chosen)],
            encoder=self.W_enc[:, read].contiguous(),
            vectors={name: vector[read] for name, vector in self._vectors.items()},
            b_dec=self.b_dec,
        )

    def whole(self) -> Sae:
        """This SAE: it is in memory already."""
        return self

    def _norm(self, x: Tensor) -> InputNorm:
        return NORMALIZATIONS[self.cfg.normalize_activations](x.to(self.dtype))


def shape_only(cfg: SaeConfig, name: str = "sae") -> Sae:
    """An SAE without its weights: tensors on the meta device, for estimates."""
    shapes = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    shapes |= {vector: (cfg.d_sae,) for vector in ARCHITECTURES[cfg.architecture].vectors}
    return Sae(cfg, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, name)


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` for a weight that is no number, in the file or after a change of precision."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"SAE '{name}': '{key}' holds weights that are not finite numbers in {tensor.dtype}",
                hint="the file is damaged, or its numbers are too large for this precision",
            )


def check_fits(sae: FeatureSource, d_model: int, n_layers: int, *, layer_norm: bool = True) -> None:
    """Raises `WidthMismatchError`, `SiteError` or `SaeError` when the SAE cannot have been trained on such a model.

    `layer_norm`: the model's norms take the mean of the residual stream off, so that it could be centred."""
    if sae.cfg.centred and not layer_norm:
        raise SaeError(
            f"SAE '{sae.name}' was trained on a residual stream without its mean (center_writing_weights); this model "
            "normalises without taking the mean off, so its stream cannot be centred",
            hint="TransformerLens leaves such models as they are whatever was asked: if it was trained there, delete "
            "the field from a copy of its config",
        )
    if sae.cfg.d_in != d_model:
        raise WidthMismatchError(
            f"SAE '{sae.name}' reads {sae.cfg.d_in} values per token, the model's residual stream has {d_model}",
            hint=f"this SAE was trained on '{sae.cfg.model_name}'" if sae.cfg.model_name else "use the SAE's own model",
        )
    if sae.cfg.site.layer >= n_layers:
        raise SiteError(
            f"SAE '{sae.name}' sits at {sae.cfg.site.name}, but the model has {n_layers} blocks",
            hint=f"this SAE was trained on '{sae.cfg.model_name}'" if sae.cfg.model_name else None,
        )
