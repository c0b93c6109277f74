"""JiT once more, as a page of plain PyTorch: no fused norm, no fused attention,
real-valued rotation, nothing shared or cached.

It checks ours (tests/test_jit_plain.py) and is what ours is timed against:
`python tests/plain_jit.py` prints seconds of a training step for both.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixlat.methods.base import DataInfo
from pixlat.methods.jit.config import JiTConfig
from pixlat.methods.jit.method import JiTMethod


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor, prefix: int, side: int) -> Tensor:
    """x (B, H, N, K): the pairs of the first half of K turn with the row, of the second with the column."""
    quarter = x.shape[-1] // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    angles = torch.cat((row[:, None] * frequencies, column[:, None] * frequencies), 1)
    cos, sin = angles.cos(), angles.sin()
    image = x[:, :, prefix:]
    a, b = image[..., 0::2], image[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((x[:, :, :prefix], turned), 2)


def attention(module: nn.Module, x: Tensor, heads: int, prefix: int, side: int) -> Tensor:
    q, k, v = module.qkv(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    q, k = rotate(norm(q, module.q_norm.weight), prefix, side), rotate(norm(k, module.k_norm.weight), prefix, side)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


def plain_forward(method: JiTMethod, z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """What `method.network(z, time, labels)` computes, from the same weights; `time` is the paper's."""
    net, config = method.network, method.config
    side, patch = z.shape[-1] // config.patch, config.patch
    angles = time[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    classes = net.class_embed.weight[labels]
    condition = nn.functional.silu(net.time_embed.mlp(torch.cat((angles.cos(), angles.sin()), 1)) + classes)
    patches = (
        z.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    )
    x = net.patch_embed.up(patches @ net.patch_embed.down.weight.flatten(1).T) + net.pos_embed
    for i, block in enumerate(net.blocks):
        if i == config.context_start:
            x = torch.cat((classes[:, None] + net.context, x), 1)
        prefix = config.context_tokens if i >= config.context_start else 0
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * attention(
            block.attn, norm(x, block.norm1.weight) * (1 + scale1) + shift1, config.heads, prefix, side
        )
        a, b = block.mlp.w12(norm(x, block.norm2.weight) * (1 + scale2) + shift2).chunk(2, -1)
        x = x + gate2 * block.mlp.w3(a * torch.sigmoid(a) * b)
    shift, scale = net.final.modulation(condition)[:, None].chunk(2, -1)
    out = net.final.linear(norm(x[:, config.context_tokens :], net.final.norm.weight) * (1 + scale) + shift)
    return (
        out.unflatten(1, (side, side))
        .unflatten(-1, (patch, patch, 3))
        .permute(0, 5, 1, 3, 2, 4)
        .flatten(4)
        .flatten(2, 3)
    )


def benchmark(config: JiTConfig, size: int, batch: int, repeats: int) -> dict[str, float]:
    """Best seconds of forward and backward, ours and plain, measured in turns."""
    torch.manual_seed(0)
    method = JiTMethod(config, DataInfo("bench", 1000, size, 1))
    z, time_, labels = torch.randn(batch, 3, size, size), torch.rand(batch), torch.arange(batch)
    forwards = {"ours": method.network, "plain": lambda *inputs: plain_forward(method, *inputs)}
    best = dict.fromkeys(forwards, float("inf"))
    for _ in range(repeats + 1):
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward(z, time_, labels).square().mean().backward()
            best[name] = min(best[name], time.perf_counter() - start)
            method.zero_grad()
    return best | {"plain_over_ours": best["plain"] / best["ours"]}


if __name__ == "__main__":
    demo = JiTConfig(depth=6, width=128, heads=4, patch=4, bottleneck=48, context_tokens=4, context_start=2)
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "B/16, batch 2": benchmark(JiTConfig(), 256, 2, 5),
                "32 px, batch 16": benchmark(demo, 32, 16, 20),
            },
            indent=1,
        )
    )
