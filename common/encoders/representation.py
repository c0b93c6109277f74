"""Frozen encoders whose tokens methods generate (RAE) or are aligned with (REPA, REG, DSD), behind one interface.

embedded                   EfficientNet-Lite0 at 128 px, inside the package: 112 channels on 8 x 8 positions
dinov2-reg-s, -b, -l       DINOv2 with registers (transformers), as RAE uses them
siglip2-b, mae-b           SigLIP2 and MAE (transformers), as RAE uses them
timm-dinov2-s, -b, -l, -g  DINOv2 without registers (timm), as REPA and REG use them
timm-dinov3-s, -b, -l      DINOv3 (timm)

RAE's encoders end in a LayerNorm without weight and bias, so that every token has mean 0 and variance 1 over channels; timm's keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks import without_autocast
from common.encoders import efficientnet_lite0 as lite0
from common.encoders.frozen import IMAGENET_MEAN, IMAGENET_STD, Frozen, channel_constants, skeleton
from common.errors import UserError, close_match
from common.external import hub_file, load_strictly, read_tensors
from common.files import sha256_of

Triple = tuple[float, float, float]
NORM_EPS = 1e-6


class Representation(NamedTuple):
    """What an encoder sees in images, float32."""

    tokens: Tensor  # (B, C, h, w), rows first
    pooled: Tensor  # (B, C'): the class token, or where there is none a mean over positions


class Facts(NamedTuple):
    """What a record keeps of an encoder."""

    name: str
    params: int
    sha256: str | None  # of the weights' file, once loaded


class RepresentationEncoder(Frozen):
    """Images (B, 3, S, S) in [-1, 1] to tokens. No gradient passes, and the blocks run under the caller's autocast."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, channels: int, pixel_mean: Triple = IMAGENET_MEAN, pixel_std: Triple = IMAGENET_STD) -> None:
        super().__init__()
        self.name = name
        self.channels = channels  # of a token
        self.pooled_channels = channels
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std  # of the network's input, for RGB in [0, 1]
        self.register_buffer("mean", channel_constants(pixel_mean), persistent=False)
        self.register_buffer("std", channel_constants(pixel_std), persistent=False)

    def grid(self, image_size: int) -> int:
        """Tokens a side for square images of `image_size` pixels; a size that the encoder cannot divide is a UserError."""
        raise NotImplementedError

    def represent(self, images: Tensor) -> Representation:
        """Tokens and pooled features of images (B, 3, S, S) in [-1, 1], in one pass."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, C, h, w) of images (B, 3, S, S) in [-1, 1]."""
        return self.represent(images).tokens

    def pooled(self, images: Tensor) -> Tensor:
        """The pooled features (B, C') of images (B, 3, S, S) in [-1, 1]."""
        return self.represent(images).pooled

    def component(self, used_at: str) -> Facts:
        """Name, parameters and digest for the record; `used_at` ("train", "sample", "both") is the caller's to keep."""
        return Facts(self.name, self.num_parameters(), self.sha256)


def as_map(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) of a square, rows first, to (B, C, h, w)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side)).float()


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """To size x size by bicubic interpolation without antialiasing and without clipping, as the papers' encoders are fed; in float32."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)


class EmbeddedEncoder(RepresentationEncoder):
    """EfficientNet-Lite0 at 128 px: its fifth stage through a LayerNorm over channels without weight and bias (eps 1e-6), as RAE ends its encoders.

    The pooled features are the last stage's mean over positions (320), as they are. Computes in float32.
    """

    def __init__(self, name: str = "embedded") -> None:
        super().__init__(name, channels=112)
        self.pooled_channels = lite0.POOLED_DIMS
        self.network = lite0.EfficientNetLite0(loaded=False)

    def load(self) -> None:
        self.network.load()
        self.sha256 = lite0.WEIGHTS_SHA256

    def grid(self, image_size: int) -> int:
        return lite0.INPUT_SIZE // 16

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        stages = self._stages(images, len(lite0.BLOCKS_PER_STAGE))
        return Representation(self._normalised(stages[lite0.TEACHER_STAGE]), stages[-1].mean(dim=(2, 3)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, 112, 8, 8), without the stages behind them."""
        return self._normalised(self._stages(images, lite0.TEACHER_STAGE + 1)[-1])

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "stages")]

    def _stages(self, images: Tensor, count: int) -> list[Tensor]:
        with without_autocast(images):
            return self.network.stages(lite0.resize((images.float() + 1) * 127.5), count)

    def _normalised(self, stage: Tensor) -> Tensor:
        return F.layer_norm(stage.permute(0, 2, 3, 1), (self.channels,), eps=NORM_EPS).permute(0, 3, 1, 2).contiguous()


# -- transformers: RAE's encoders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubEncoder:
    """An encoder of the transformers library: where its weights are and how RAE feeds and reads it."""

    repository: str
    licence: str
    family: str  # of the library's classes: <family>Config, <family>Model
    config: dict[str, Any]
    final_norm: str  # the module that loses weight and bias
    patch: int
    prefix_tokens: int  # dropped: the class token first, then registers
    unwanted: tuple[str, ...] = ()  # how names begin in its file that belong to other networks
    pixel_mean: Triple = IMAGENET_MEAN
    pixel_std: Triple = IMAGENET_STD


def _vit(width: int, depth: int = 12) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}


def _dinov2(size: str, width: int, depth: int = 12) -> HubEncoder:
    config = _vit(width, depth) | {"image_size": 518, "patch_size": 14, "num_register_tokens": 4}
    return HubEncoder(f"facebook/dinov2-with-registers-{size}", "Apache-2.0", "Dinov2WithRegisters", config, "layernorm", patch=14, prefix_tokens=5)


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
    """RAE's procedure: bicubic resize without antialiasing, normalise, all tokens through a final LayerNorm without weight and bias.

    Networks with patches of 14 pixels see the image at 14/16 of its size (224 for 256, 448 for 512), so every encoder has a token for 16 pixels.
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
        norm = network.get_submodule(self.spec.final_norm if hasattr(network, self.spec.final_norm) else f"vision_model.{self.spec.final_norm}")
        norm.weight = norm.bias = None
        return network

    def load(self) -> None:
        spec = self.spec
        file = hub_file(spec.repository, given=self.weights, licence=spec.licence)
        state = {key: value for key, value in read_tensors(file).items() if not key.startswith(spec.unwanted)}
        self.network = self._without_affine(_from_state(_classes(spec.family)[1], self.config, state, file)).requires_grad_(False).eval()
        self.sha256 = sha256_of(file)

    def grid(self, image_size: int) -> int:
        return _grid_of_16(self.name, image_size)

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        grid = self.grid(images.shape[-1])
        pixels = (resize_bicubic((images + 1) / 2, grid * self.spec.patch) - self.mean) / self.std
        tokens = self._tokens(pixels, grid**2)
        patches = tokens[:, self.spec.prefix_tokens :]
        return Representation(as_map(patches), (tokens[:, 0] if self.spec.prefix_tokens else patches.mean(dim=1)).float())

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "forward")]

    def _tokens(self, pixels: Tensor, count: int) -> Tensor:
        """All tokens (B, prefix + count, C) after the final norm."""
        options: dict[str, Any] = {} if self.spec.family == "Dinov2WithRegisters" else {"interpolate_pos_encoding": True}
        if self.spec.family == "ViTMAE":  # sorts the patches by this noise: equal to their order, it moves none
            options["noise"] = torch.arange(count, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)
        tokens: Tensor = self.network(pixels, **options).last_hidden_state
        return tokens


def _classes(family: str) -> tuple[type, Any]:
    """The configuration and the model class of a family."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError("this encoder needs the package transformers. Install it: pip install transformers") from error
    return getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}Model")


def _from_state(model: Any, config: Any, state: dict[str, Tensor], file: Path) -> Any:
    """The library's own loading of a state, which knows the names that its older versions wrote; incomplete or misshapen weights are a UserError."""
    try:
        with _quiet():
            network, report = model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} does not fit {model.__name__}: {str(error).splitlines()[0]}") from error
    if faults := [f"{kind} {key}" for kind in ("missing", "mismatched", "unexpected") for key in sorted(map(str, report[f"{kind}_keys"]))]:
        raise UserError(f"{file} does not fit {model.__name__}, {len(faults)} keys differ: {'; '.join(faults[:8])}")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bar and reports: what they say becomes an error or is nothing."""
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


# -- timm: the teachers of REPA and REG ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimmEncoderSpec:
    """A vision transformer of timm."""

    architecture: str
    repository: str
    licence: str
    patch: int
    options: dict[str, Any] = field(default_factory=dict)  # of the architecture

    def make(self, **options: Any) -> nn.Module:
        """The network with random weights, for images of any size."""
        import timm

        network: nn.Module = timm.create_model(self.architecture, num_classes=0, dynamic_img_size=True, **self.options | options)
        return network


def _timm(size: str, version: int) -> TimmEncoderSpec:
    patch, data, licence = (14, "lvd142m", "Apache-2.0") if version == 2 else (16, "lvd1689m", "DINOv3 License")
    architecture = f"vit_{size}_patch{patch}_dinov{version}"
    return TimmEncoderSpec(architecture, f"timm/{architecture}.{data}", licence, patch)


TIMM_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
TIMM_ENCODERS = {f"timm-dinov2-{letter}": _timm(size, 2) for letter, size in TIMM_SIZES.items()} | {
    f"timm-dinov3-{letter}": _timm(size, 3) for letter, size in TIMM_SIZES.items() if letter != "g"
}


class TimmEncoder(RepresentationEncoder):
    """REPA's procedure: normalise, then bicubic resize without antialiasing to `patch` pixels for each 16; the final LayerNorm keeps its affine.

    Position tables are resampled bicubically with antialiasing from the trained grid, prefix apart.
    """

    def __init__(self, name: str, spec: TimmEncoderSpec, weights: str | None = None) -> None:
        """weights: a folder or file of `spec.repository`, or the authors' dinov2_vit*14_pretrain.pth; None for the Hugging Face cache."""
        network = skeleton(spec.make)
        super().__init__(name, network.embed_dim)
        self.spec = spec
        self.weights = weights
        self.network = network
        self.eval()

    def load(self) -> None:
        from timm.models import eva, vision_transformer

        file = hub_file(self.spec.repository, given=self.weights, licence=self.spec.licence)
        convert: Callable[..., dict[str, Tensor]] = (eva if isinstance(self.network, eva.Eva) else vision_transformer).checkpoint_filter_fn
        load_strictly(self.network, convert(read_tensors(file), self.network), file)
        self._compute_tables()
        self.sha256 = sha256_of(file)

    def _compute_tables(self) -> None:
        """Fills the buffers that are in no file (DINOv3's rotary periods) from a network of one block."""
        if not any(buffer.is_meta for buffer in self.network.buffers()):
            return
        with torch.random.fork_rng(devices=[]):
            computed = self.spec.make(depth=1).named_buffers()
        for name, buffer in computed:
            owner, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(owner), leaf, buffer)

    def grid(self, image_size: int) -> int:
        return _grid_of_16(self.name, image_size)

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        normalised = ((images + 1) / 2 - self.mean) / self.std
        tokens = self.network.forward_features(resize_bicubic(normalised, self.grid(images.shape[-1]) * self.spec.patch))
        return Representation(as_map(tokens[:, self.network.num_prefix_tokens :]), tokens[:, 0].float())

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "forward_features")]


def _grid_of_16(name: str, image_size: int) -> int:
    if image_size % 16:
        raise UserError(f"the encoder {name} has a token for 16 x 16 pixels, and data.image_size={image_size} is not a multiple of 16.")
    return image_size // 16


def encoder_names() -> list[str]:
    """Every encoder that `build_encoder` knows."""
    return ["embedded", *HUB_ENCODERS, *TIMM_ENCODERS]


def build_encoder(name: str, weights: str | None = None) -> RepresentationEncoder:
    """A frozen encoder by name, without weights until `load`. weights: a file or folder in the place of the Hugging Face cache."""
    if name == "embedded":
        return EmbeddedEncoder()
    if name in HUB_ENCODERS:
        return TransformersEncoder(name, HUB_ENCODERS[name], weights)
    if name in TIMM_ENCODERS:
        return TimmEncoder(name, TIMM_ENCODERS[name], weights)
    raise UserError(f"encoder={name!r} is not known.{close_match(name, encoder_names())} Encoders: {', '.join(encoder_names())}.")
