"""Compares the cost of every method's published setting with the printed figure. Counting runs on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pixlat.common.accounting.macs import BATCH, on_meta, sampling_cost
from pixlat.common.config.resolve import resolve
from pixlat.common.datasets.load import summarise
from pixlat.common.seeds import Noise
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.training import panels
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo, Method
from pixlat.methods.rae.network import macs_per_forward

GIGA = 1e9
TOLERANCE = 0.005
ALL = "all products"
NO_ATTENTION = "without the products of attention"
ONCE = "the head's modulation once an image, not once a token"


@dataclass(frozen=True)
class Published:
    """One printed figure: GMACs of one forward, which the papers call Gflops."""

    name: str
    method: str
    preset: str
    printed: float
    accounting: str = ALL  # the accounting that gives the paper's figure
    network: str = "network"
    overrides: Sequence[tuple[str, str]] = ()


PUBLISHED = (
    Published("JiT-B/16", "jit", "imagenet256-b", 25),
    Published("JiT-L/16", "jit", "imagenet256-l", 88),
    Published("JiT-H/16", "jit", "imagenet256-h", 182),
    Published("JiT-G/16", "jit", "imagenet256-g", 383),
    Published("JiT-B/32 at 512", "jit", "imagenet512-b", 26),
    Published("JiT-L/32 at 512", "jit", "imagenet512-l", 89),
    Published("JiT-H/32 at 512", "jit", "imagenet512-h", 183),
    Published("pMF-B/16", "pmf", "imagenet256-b", 33),
    Published("pMF-L/16", "pmf", "imagenet256-l", 117),
    Published("pMF-H/16", "pmf", "imagenet256-h", 271),
    Published("DiT-S/2", "dit", "imagenet256-s", 6.06),
    Published("DiT-B/2", "dit", "imagenet256-b", 23.01),
    Published("DiT-L/2", "dit", "imagenet256-l", 80.71),
    Published("DiT-XL/2", "dit", "imagenet256-xl", 118.64),
    Published("DiT-XL/2 at 512", "dit", "imagenet512-xl", 524.60),
    Published("SiT-XL/2", "sit", "imagenet256-xl", 119),
    Published("REPA XL/2", "repa", "imagenet256-xl", 114.46, NO_ATTENTION),
    Published("REG XL/2", "reg", "imagenet256-xl", 114.90, NO_ATTENTION),
    Published("SD-VAE decoder", "reg", "imagenet256-xl", 310, NO_ATTENTION, "decoder"),
    Published(
        "RAE decoder ViT-B", "rae", "imagenet256-dh-xl", 22.2, NO_ATTENTION, "decoder", (("model.decoder_size", "b"),)
    ),
    Published(
        "RAE decoder ViT-L", "rae", "imagenet256-dh-xl", 78.1, NO_ATTENTION, "decoder", (("model.decoder_size", "l"),)
    ),
    Published("RAE decoder ViT-XL", "rae", "imagenet256-dh-xl-guided", 106.7, NO_ATTENTION, "decoder"),
    Published("RAE DiT-DH-XL", "rae", "imagenet256-dh-xl-guided", 146, ONCE),
    Published("RAE DiT-DH-XL at 512", "rae", "imagenet512-dh-xl", 642, ONCE),
)


@dataclass(frozen=True)
class Counted:
    """The counted MACs of one row."""

    executed: int  # MACs of one forward pass as executed
    explained: int  # MACs of one forward pass in the paper's accounting
    forwards: str  # number of forward passes of each network for one image with the preset's sampler
    image: int  # MACs of one image: all networks, guidance and decoder


def count(row: Published) -> Counted:
    """Runs the preset's sampler on the meta device."""
    run = resolve(get_spec(row.method), {"preset": row.preset, **dict(row.overrides)})
    info = DataInfo.of(summarise(run.data))
    method = on_meta(get_class(row.method), run.model, info)
    cost = sampling_cost(method, run.sample)
    executed = cost.macs_per_forward[row.network]
    explained = {
        ALL: lambda: executed,
        NO_ATTENTION: lambda: executed - attention_macs(method, row.network, run.sample),
        ONCE: lambda: once(method, info),
    }
    forwards = " + ".join(f"{calls:g} {name}" for name, calls in cost.net_forwards.items())
    return Counted(executed, explained[row.accounting](), forwards, cost.macs_per_image)


class AttentionCounter(TorchFunctionMode):
    """Sums the MACs of the products q k^T and weights v, with q, k and v of (B, H, L, K), in the `with` block."""

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.macs += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return func(*args, **(kwargs or {}))


def attention_macs(method: Method, network: str, sample: Any) -> int:
    """MACs of the two products of attention in one forward of one image."""
    module, calls = method.sampling_networks()[network], []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        method.sample(
            torch.zeros(BATCH, dtype=torch.int64, device="meta"), Noise(range(BATCH), "meta"), replace(sample, steps=2)
        )
        handle.remove()
        args, kwargs = calls[0]
        with AttentionCounter() as counter:
            module(*args, **kwargs)
    return counter.macs // next(len(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def once(method: Method, info: DataInfo) -> int:
    """MACs in RAE's accounting, which counts the modulation of its wide head once per image."""
    channels, grid, _ = method.latent_shape  # type: ignore[misc]
    assert isinstance(channels, int) and isinstance(grid, int) and isinstance(method.network, nn.Module)
    return macs_per_forward(method.config.shape, channels, grid, info.num_classes)[1]


def rounding(printed: float) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 / 10 ** len(f"{printed:g}".partition(".")[2])


def measure(budget: Budget) -> Evidence:
    """Counts every row, as executed and in the paper's accounting."""
    counted = {row: count(row) for row in PUBLISHED}
    off = {
        row: max(0.0, abs(found.explained / GIGA - row.printed) - rounding(row.printed)) / row.printed
        for row, found in counted.items()
    }
    worst = max(off, key=off.__getitem__)
    figure, [[axes]] = panels(1, 1, (7.0, 6.0))
    ratios = [counted[row].executed / GIGA / row.printed for row in PUBLISHED]
    colours = {ALL: "C0", NO_ATTENTION: "C1", ONCE: "C3"}
    for accounting, colour in colours.items():
        chosen = [i for i, row in enumerate(PUBLISHED) if row.accounting == accounting]
        axes.barh(chosen, [100 * (ratios[i] - 1) for i in chosen], color=colour, label=f"the paper counts {accounting}")
    axes.set_yticks(range(len(PUBLISHED)), [row.name for row in PUBLISHED], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel("executed, less what is printed (%)")
    axes.legend(frameon=False, fontsize=8)
    return Evidence(
        estimates={"deviation": Estimate.exact(off[worst])},
        headers=[
            "",
            "GMACs a forward",
            "printed",
            "in the paper's accounting",
            "the paper counts",
            "forwards an image",
            "GMACs an image",
        ],
        rows=[
            [
                row.name,
                f"{found.executed / GIGA:.2f}",
                f"{row.printed:g}",
                f"{found.explained / GIGA:.2f}",
                row.accounting,
                found.forwards,
                f"{found.image / GIGA:,.0f}",
            ]
            for row, found in counted.items()
        ],
        figure=figure,
        remarks=[
            f"Farthest off: {worst.name}. The samplers are those of the presets, with what they guide and the decoder."
        ],
    )


CLAIM = Claim(
    name="cost",
    paper="JiT, pMF, DiT, SiT, REPA, REG and RAE: their tables of Gflops",
    statement=(
        'The "Gflops" of these papers are multiply-accumulates of one forward; '
        "where they differ from what is executed, it is for the products of attention "
        "or for the wide head's modulation."
    ),
    setting=(
        "Every preset is built and sampled on tensors without numbers, and the products are counted; "
        "nothing is trained. REPA, REG and all decoders are printed without the two products of attention, "
        "DiT-DH as if its head were modulated once an image."
    ),
    criteria=(
        Criterion(
            "deviation",
            "the largest relative deviation from a printed figure, in its paper's accounting and beyond its rounding,",
            "at most",
            TOLERANCE,
        ),
    ),
    measure=measure,
    minutes=(1.0, 2.0),
    num_seeds=(0, 0),
)
