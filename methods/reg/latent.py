"""The base of the four methods: a frozen tokenizer, the transformer on its latents, label drop and guidance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixlat.common.config.resolve import require
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.frozen.store_latents import check_encoder
from pixlat.common.frozen.tokenizer import build_tokenizer
from pixlat.common.layers.transformer import drop_labels
from pixlat.methods.base import Batch, DataInfo, Method, Pretrained
from pixlat.methods.reg.config import LatentConfig
from pixlat.methods.reg.network import LatentTransformer, Shape
from pixlat.methods.reg.reference import from_released

LETTERS = {(12, 384): "S", (12, 768): "B", (24, 1024): "L", (28, 1152): "XL"}


class LatentMethod(Method):
    """Tokenizer and transformer; subclasses add objective and sampler."""

    space = "latent_vae"
    external: Mapping[str, Pretrained] = {"tokenizer": Pretrained("tokenizer", "both")}
    takes_moments = True

    def __init__(self, config: LatentConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.build_frozen()
        factor, patch = self.tokenizer.factor, config.patch
        require(
            data.image_size % factor == 0,
            "data.image_size",
            data.image_size,
            f"must be a multiple of the tokenizer's {factor} pixels",
        )
        self.side = data.image_size // factor
        require(self.side % patch == 0, "model.patch", patch, f"must divide the {self.side} latent positions of a side")
        if data.latents is not None:
            expected = (2 * self.tokenizer.channels, self.side, self.side)
            rule = f"do not fit model.tokenizer={config.tokenizer}, whose moments have the shape {expected}"
            require(data.latents.shape == expected, "data.latents: the stored moments", data.latents.shape, rule)
        self.network = LatentTransformer(self.shape())
        caches = config.remember and data.latents is None  # stored moments need no cache
        self.moments_of = FeatureTable(self.tokenizer.encode_moments, data.num_train if caches else 0)

    @classmethod
    def needs_images(cls, data: DataInfo) -> bool:
        return data.latents is None

    def build_frozen(self) -> None:
        """Creates the frozen sub-modules, without their weights."""
        self.tokenizer = build_tokenizer(self.config.tokenizer, self.config.tokenizer_path)

    def shape(self) -> Shape:
        """The transformer's sizes."""
        config, channels = self.config, self.tokenizer.channels
        return Shape(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            patch=config.patch,
            side=self.side,
            channels=channels,
            outputs=channels,
            num_classes=self.data.num_classes,
            qk_norm=config.qk_norm,
            exact_attention=config.attention == "reference",
        )

    def load_external(self) -> None:
        super().load_external()
        if self.data.latents is not None:
            check_encoder(self.data.latents.encoder_sha256, self.tokenizer)

    # -- training ------------------------------------------------------------------------------------------------------

    def latents(self, batch: Batch) -> Tensor:
        """One normalised draw from each image's posterior, (B, C, S, S). Uses stored moments if the batch has them."""
        mean, std = batch["moments"].float().chunk(2, dim=1) if "moments" in batch else self.moments_of(batch)
        return self.tokenizer.normalise(mean + std * torch.randn_like(mean))

    def drop_labels(self, labels: Tensor) -> Tensor:
        """The labels with some replaced by "no class"."""
        return drop_labels(labels, self.config.label_drop, self.data.num_classes)

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def probe(self, images: Tensor, time: float) -> None:
        """One forward pass without classes on images (B, 3, S, S) at noise level `time` (1 is noise).

        For callers that record the blocks' outputs with hooks.
        """
        nulls = torch.full((len(images),), self.data.num_classes, device=images.device)
        moments = torch.cat(self.tokenizer.encode_moments(images), dim=1)
        self.probe_latents(self.latents({"moments": moments}), images, time, nulls)

    def probe_latents(self, x: Tensor, images: Tensor, time: float, labels: Tensor) -> None:
        """The forward pass of `probe`, for the latents x of the images."""
        raise NotImplementedError

    # -- sampling ------------------------------------------------------------------------------------------------------

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return self.tokenizer.channels, self.side, self.side

    def channel_scale(self, guidance: float, guided_channels: int | None) -> Tensor:
        """(C, 1, 1): the guidance scale of each channel. Channels without guidance have scale 1."""
        scale = torch.ones(self.tokenizer.channels, 1, 1)
        scale[:guided_channels] = guidance
        return scale

    def with_null(self, labels: Tensor) -> Tensor:
        """(2 B,): the labels, then "no class" B times."""
        return torch.cat((labels, torch.full_like(labels, self.data.num_classes)))

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network, "decoder": self.tokenizer.decoder}

    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.normalise(self.tokenizer.encode_moments(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        return self.tokenizer.decode(latents)

    # -- records -------------------------------------------------------------------------------------------------------

    def size(self) -> str | None:
        """The size's name, such as "XL/2"; None if depth and width have no name."""
        letter = LETTERS.get((self.config.depth, self.config.width))
        return f"{letter}/{self.config.patch}" if letter else None

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_released(state, self.own_tensors(), self.config.patch, align_after=0)

    def own_tensors(self) -> dict[str, Tensor]:
        """The state without the frozen networks."""
        return {key: tensor for key, tensor in self.state_dict().items() if key.partition(".")[0] not in self.external}
