"""One transformer with three roles: it encodes images, denoises latents and decodes latents (arXiv 2511.14716).

README.md marks the parts that are ours. Shape legend: B batch, N tokens, D width, C latent channels, S image side,
p patch side, h = S / p, N = h h. In every role a token is a patch. Times are the paper's here: 1 is data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.layers.dit import Attention, DitBlock, Mlp
from pixlat.common.layers.transformer import (
    NORM_EPS,
    PatchEmbed,
    SinusoidalEmbedding,
    initialize_linears,
    sincos_table,
    unpatchify,
)
from pixlat.common.maths.float32 import at_least_float32
from pixlat.methods.dsd.config import DsdConfig


class Features(NamedTuple):
    """The trunk's features after one pass."""

    shallow: Tensor  # (B, N, D) after the aligned block
    last: Tensor  # (B, N, D)


class Encoded(NamedTuple):
    """The encoder's output."""

    z: Tensor  # (B, N, C), float32 at least
    features: Features


class Denoised(NamedTuple):
    """The outputs of the two heads for a noisy latent, in float32 or float64."""

    output: Tensor  # (B, N, C), the diffusion head's: a clean latent or a velocity, by `config.predict`
    velocity: Tensor  # (B, N, C), towards the data
    features: Features


class Block(nn.Module):
    """x += Attention(norm(x)), then x += MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=NORM_EPS), Attention(width, heads, qk_norm=True)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=NORM_EPS), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """The blocks that all roles share. Time and class reach them only as part of the tokens."""

    positions: Tensor

    def __init__(self, config: DsdConfig, grid: int) -> None:
        super().__init__()
        self.aligned_block = config.aligned_block
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.register_buffer("positions", sincos_table(grid, config.width)[None])

    def forward(self, tokens: Tensor, with_hooks: bool = True) -> Features:
        """Runs the blocks on tokens (B, N, D). with_hooks: whether forward hooks on the blocks run in this pass."""
        x = tokens + self.positions
        shallow = x
        for number, block in enumerate(self.blocks, 1):
            x = block(x) if with_hooks else block.forward(x)
            shallow = x if number == self.aligned_block else shallow
        return Features(shallow, x)


class LatentNorm(nn.Module):
    """Gives latents unit scale without parameters: they match unit noise, and training cannot change the scale."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.kind = kind
        self.batch_norm = nn.BatchNorm1d(channels, affine=False) if kind == "bn" else None

    def forward(self, z: Tensor) -> Tensor:
        z = at_least_float32(z)
        if self.batch_norm is not None:
            return self.batch_norm(z.flatten(0, 1)).view_as(z)
        return F.layer_norm(z, (self.channels,), eps=NORM_EPS) if self.kind == "ln" else z


class Encoder(nn.Module):
    """Maps images to latents through the trunk. The target's encoder is an average of this module."""

    def __init__(self, config: DsdConfig, grid: int, channels: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, config.patch, config.width, 0, bias=True)
        self.mask_token = nn.Parameter(torch.empty(config.width)) if config.mask else None
        self.role = nn.Parameter(torch.empty(config.width))
        self.trunk = Trunk(config, grid)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, config.latent_channels)
        self.latent_norm = LatentNorm(config.latent_norm, config.latent_channels)

    def forward(self, images: Tensor, hidden: Tensor | None = None, with_hooks: bool = True) -> Encoded:
        """Encodes images (B, 3, S, S) in [-1, 1].

        hidden (B, N) bool: patches that the learned mask token replaces. with_hooks: see `Trunk`.
        """
        tokens = self.patch_embed(images)
        if hidden is not None:
            assert self.mask_token is not None
            tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        features = self.trunk(tokens + self.role, with_hooks)
        return Encoded(self.latent_norm(self.out(self.norm(features.last))), features)


class DiffusionHead(nn.Module):
    """adaLN-zero blocks on the trunk's features, then a norm and a linear map to the latent's channels."""

    def __init__(self, config: DsdConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            DitBlock(config.width, config.heads, qk_norm=True) for _ in range(config.head_depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, config.latent_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features (B, N, D) and condition (B, D) to (B, N, C), in float32 or float64."""
        for block in self.blocks:
            x = block(x, condition)
        return at_least_float32(self.out(self.norm(x)))


class DsdNetwork(nn.Module):
    """The encoder, whose trunk also denoises and decodes, and the layers of the other two roles."""

    def __init__(self, config: DsdConfig, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, channels
        self.detach_velocity = config.velocity_head_detach
        width = config.width
        self.encoder = Encoder(config, image_size // config.patch, channels)
        self.latent_embed = nn.Linear(config.latent_channels, width)
        self.denoise_role = nn.Parameter(torch.empty(width))
        self.decode_role = nn.Parameter(torch.empty(width))
        self.time_embed = SinusoidalEmbedding(width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.diffusion_head = DiffusionHead(config)
        self.velocity_head = DiffusionHead(config)
        self.velocity_latent = nn.Linear(config.latent_channels, width) if config.velocity_latent else None
        self.image_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.image_out = nn.Linear(width, config.patch**2 * channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier for every matrix, normal for embeddings, zero for modulations; latents start at unit scale.

        No head starts at zero, because gradients must pass through the heads.
        """
        initialize_linears(
            self, zero=lambda name: "adaLN_modulation" in name, normal=lambda name: name.startswith("time_embed")
        )
        nn.init.normal_(self.encoder.out.weight, std=self.encoder.out.in_features**-0.5)
        for parameter in (
            self.class_embed.weight,
            self.encoder.role,
            self.encoder.mask_token,
            self.denoise_role,
            self.decode_role,
        ):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)

    def condition(self, time: Tensor, labels: Tensor) -> Tensor:
        """(B, D) from times (B,), of which 1 is data, and labels (B,) int64, of which num_classes is "no class"."""
        return self.time_embed(time) + self.class_embed(labels)

    def features(self, z: Tensor, condition: Tensor) -> Features:
        """The trunk's features of noisy latents (B, N, C)."""
        return self.encoder.trunk(self.latent_embed(z) + self.denoise_role + condition[:, None])

    def denoise(self, z: Tensor, time: Tensor, labels: Tensor) -> Denoised:
        """The outputs of both heads, for training."""
        condition = self.condition(time, labels)
        features = self.features(z, condition)
        output = self.diffusion_head(features.last, condition)
        inputs = (features.last, z, condition)
        velocity = self.velocity(*((tensor.detach() for tensor in inputs) if self.detach_velocity else inputs))
        return Denoised(output, velocity, features)

    def velocity(self, last: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        """The velocity head's output for the trunk's last features (B, N, D) of a noisy latent z (B, N, C)."""
        x = last if self.velocity_latent is None else last + self.velocity_latent(z.to(last.dtype))
        output: Tensor = self.velocity_head(x, condition)
        return output

    def forward(self, z: Tensor, time: Tensor, labels: Tensor, head: str) -> Tensor:
        """One evaluation of the sampler: the velocity head's output or, for head="latent", the diffusion head's.

        The other head does not run.
        """
        condition = self.condition(time, labels)
        last = self.features(z, condition).last
        output: Tensor = (
            self.velocity(last, z, condition) if head == "velocity" else self.diffusion_head(last, condition)
        )
        return output

    def decode(self, z: Tensor) -> Tensor:
        """Decodes latents (B, N, C) to images (B, 3, S, S), nominally in [-1, 1], in float32 or float64."""
        features = self.encoder.trunk(self.latent_embed(z) + self.decode_role)
        return at_least_float32(unpatchify(self.image_out(self.image_norm(features.last)), self.patch, self.channels))


class DecodePass(nn.Module):
    """The network as a decoder, so that the cost of decoding is counted apart from denoising.

    The module owns no tensor, so that the shared parameters count once.
    """

    def __init__(self, network: DsdNetwork) -> None:
        super().__init__()
        self.shared = (network,)  # torch does not register a module in a tuple as a sub-module

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, N, C) to images."""
        return self.shared[0].decode(z)
