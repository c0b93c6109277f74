"""Frozen encoders from the package transformers: DINOv2, SigLIP2 and MAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.frozen.base import IMAGENET_MEAN, IMAGENET_STD, skeleton
from pixlat.common.frozen.representation import (
    Representation,
    RepresentationEncoder,
    Triple,
    as_map,
    grid_of_16,
    resize_bicubic,
)
from pixlat.common.weights.hub import hub_file
from pixlat.common.weights.tensors import read_tensors


@dataclass(frozen=True)
class HubEncoder:
    """An encoder of the transformers library: where its weights are, and how RAE prepares its input and output."""

    repository: str
    licence: str
    family: str  # beginning of the library's class names: <family>Config, <family>Model
    config: dict[str, Any]
    final_norm: str  # name of the last norm, whose weight and bias are removed
    patch: int
    prefix_tokens: int  # tokens to drop at the beginning: the class token, then registers
    unwanted: tuple[str, ...] = ()  # prefixes of names in its file that belong to other networks
    pixel_mean: Triple = IMAGENET_MEAN
    pixel_std: Triple = IMAGENET_STD


def _vit(width: int, depth: int = 12) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}


def _dinov2(size: str, width: int, depth: int = 12) -> HubEncoder:
    config = _vit(width, depth) | {"image_size": 518, "patch_size": 14, "num_register_tokens": 4}
    return HubEncoder(
        f"facebook/dinov2-with-registers-{size}",
        "Apache-2.0",
        "Dinov2WithRegisters",
        config,
        "layernorm",
        patch=14,
        prefix_tokens=5,
    )


HUB_ENCODERS = {
    "dinov2-reg-s": _dinov2("small", 384),
    "dinov2-reg-b": _dinov2("base", 768),
    "dinov2-reg-l": _dinov2("large", 1024, 24),
    "siglip2-b": HubEncoder(
        "google/siglip2-base-patch16-256",
        "Apache-2.0",
        "SiglipVision",
        _vit(768) | {"intermediate_size": 3072, "image_size": 256, "patch_size": 16, "vision_use_head": False},
        "post_layernorm",
        patch=16,
        prefix_tokens=0,
        unwanted=("text_model.", "logit_", "vision_model.head.", "head."),
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    ),
    "mae-b": HubEncoder(
        "facebook/vit-mae-base",
        "CC BY-NC 4.0 (the authors' repository)",
        "ViTMAE",
        _vit(768) | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16, "mask_ratio": 0.0},
        "layernorm",
        patch=16,
        prefix_tokens=1,
        unwanted=("decoder.", "mask_token"),
    ),
}


class TransformersEncoder(RepresentationEncoder):
    """An encoder that is used as in RAE: resize bicubically without antialiasing, normalise, encode.

    All tokens pass a final LayerNorm without weight and bias. Networks with patches of 14 pixels get the image
    at 14/16 of its size (224 for 256, 448 for 512), so every encoder has one token for 16 x 16 pixels.
    """

    def __init__(self, name: str, spec: HubEncoder, weights: str | None = None) -> None:
        """weights: a folder or file of `spec.repository`; None for the Hugging Face cache."""
        super().__init__(name, spec.config["hidden_size"], spec.pixel_mean, spec.pixel_std)
        self.spec = spec
        self.weights = weights
        config, model = _classes(spec.family)
        self.config = config(**spec.config)
        self.network = skeleton(lambda: self._without_affine(model(self.config)))
        self.eval()

    def _without_affine(self, network: Any) -> Any:
        norm = network.get_submodule(
            self.spec.final_norm if hasattr(network, self.spec.final_norm) else f"vision_model.{self.spec.final_norm}"
        )
        norm.weight = norm.bias = None
        return network

    def load(self) -> None:
        spec = self.spec
        file = hub_file(spec.repository, given=self.weights, licence=spec.licence)
        state = {key: value for key, value in read_tensors(file).items() if not key.startswith(spec.unwanted)}
        self.network = (
            self._without_affine(_from_state(_classes(spec.family)[1], self.config, state, file))
            .requires_grad_(False)
            .eval()
        )
        self.sha256 = sha256_of(file)

    def grid(self, image_size: int) -> int:
        return grid_of_16(self.name, image_size)

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        grid = self.grid(images.shape[-1])
        pixels = (resize_bicubic((images + 1) / 2, grid * self.spec.patch) - self.mean) / self.std
        tokens = self._tokens(pixels, grid**2)
        patches = tokens[:, self.spec.prefix_tokens :]
        return Representation(
            as_map(patches), (tokens[:, 0] if self.spec.prefix_tokens else patches.mean(dim=1)).float()
        )

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "forward")]

    def _tokens(self, pixels: Tensor, count: int) -> Tensor:
        """All tokens (B, prefix + count, C) after the final norm."""
        options: dict[str, Any] = (
            {} if self.spec.family == "Dinov2WithRegisters" else {"interpolate_pos_encoding": True}
        )
        if self.spec.family == "ViTMAE":  # it sorts the patches by this noise; ascending numbers keep their order
            options["noise"] = torch.arange(count, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)
        tokens: Tensor = self.network(pixels, **options).last_hidden_state
        return tokens


def _classes(family: str) -> tuple[type, Any]:
    """The configuration class and the model class of a family."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError("this encoder needs the package transformers. Install it: pip install transformers") from error
    return getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}Model")


def _from_state(model: Any, config: Any, state: dict[str, Tensor], file: Path) -> Any:
    """Loads a state by the library's own loader, because that knows the names that older versions wrote.

    Raises UserError if weights are missing, unexpected or misshapen.
    """
    try:
        with _quiet():
            network, report = model.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} does not fit {model.__name__}: {str(error).splitlines()[0]}") from error
    if faults := [
        f"{kind} {key}"
        for kind in ("missing", "mismatched", "unexpected")
        for key in sorted(map(str, report[f"{kind}_keys"]))
    ]:
        raise UserError(f"{file} does not fit {model.__name__}, {len(faults)} keys differ: {'; '.join(faults[:8])}")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's progress bar and reports: `_from_state` turns the relevant part into an error."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
