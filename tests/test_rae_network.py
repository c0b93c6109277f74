"""DiT-DH and LightningDiT: published sizes, an independent plain computation, initialisation,
the released names, and the width rule.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from pixlat.common.errors import UserError
from pixlat.common.layers.transformer import rope_table, sincos_table
from pixlat.common.maths.flow import interpolate
from pixlat.methods.rae.config import NetworkShape
from pixlat.methods.rae.network import LatentDiT, macs_per_forward
from pixlat.methods.rae.reference import network_from_released, network_to_released, recognise

HEAD = (2048, 2, 16)
PLAIN = (0, 0, 0)
BACKBONES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
DIT_DH = {size: NetworkShape(*backbone, *HEAD) for size, backbone in BACKBONES.items()}
DIT = {size: NetworkShape(*backbone, *PLAIN) for size, backbone in BACKBONES.items()}
TINY = NetworkShape(24, 2, 2, 32, 2, 4)
TINY_PLAIN = NetworkShape(24, 3, 2, *PLAIN)


def on_meta(shape, channels=768, grid=16):
    with torch.device("meta"):
        return LatentDiT(shape, channels, grid, 1000)


def counts(network):
    trained = sum(p.numel() for p in network.parameters())
    return trained, sum(tensor.numel() for tensor in network.state_dict().values())


@pytest.mark.parametrize(
    ("size", "total", "trainable", "tensors"),
    [
        ("s", 196_455_764, 196_357_204, 190),
        ("b", 294_295_892, 294_099_028, 190),
        ("l", 621_744_436, 621_482_036, 334),
        ("xl", 838_675_796, 838_380_628, 382),
    ],
)
def test_parameters_of_the_published_dit_dh(size, total, trainable, tensors):
    network = on_meta(DIT_DH[size])
    assert counts(network) == (trainable, total)
    assert len(network_to_released(network.state_dict(), DIT_DH[size])) == tensors


@pytest.mark.parametrize(
    ("size", "channels", "millions"),
    [("s", 768, 33.65), ("b", 768, 131.88), ("l", 768, 459.92), ("xl", 768, 677.25), ("xl", 384, 676.36)],
)
def test_parameters_of_the_plain_baseline(size, channels, millions):
    assert counts(on_meta(DIT[size], channels))[1] / 1e6 == pytest.approx(millions, abs=0.005)


PUBLISHED_MACS = [
    (DIT_DH["s"], 16, 48.47), (DIT_DH["b"], 16, 65.69), (DIT_DH["l"], 16, 123.55),
    (DIT_DH["xl"], 16, 161.58), (DIT_DH["xl"], 32, 702.8),
    (DIT["s"], 16, 6.20), (DIT["b"], 16, 23.30), (DIT["l"], 16, 81.08), (DIT["xl"], 16, 119.06),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "grid", "executed"), PUBLISHED_MACS)
def test_multiply_accumulates_of_the_published_networks(shape, grid, executed):
    assert macs_per_forward(shape, 768, grid, 1000)[0] / 1e9 == pytest.approx(
        executed, abs=0.05 if executed > 200 else 0.005
    )


def test_the_papers_accounting_counts_the_heads_modulation_once_an_image():
    executed, published = macs_per_forward(DIT_DH["xl"], 768, 16, 1000)
    assert 146 <= published / 1e9 < 147  # "146" in the tables of other papers
    assert executed / published == pytest.approx(1.10, abs=0.005)
    assert (executed - published) / 1e9 == pytest.approx(2 * 6.42 + 2.14, abs=0.02)
    executed, published = macs_per_forward(DIT_DH["b"], 768, 16, 1000)
    assert executed / published == pytest.approx(1.30, abs=0.005)
    executed, published = macs_per_forward(DIT["xl"], 768, 16, 1000)
    assert executed == published


# -- the computation ---------------------------------------------------------------------------------------------------


def filled(shape, channels=5, grid=3, classes=4):
    """A network in which every number matters."""
    torch.manual_seed(0)
    network = LatentDiT(shape, channels, grid, classes)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3 if p.ndim > 1 else 0.1)
        for name, p in network.named_parameters():
            if "norm" in name:
                p.add_(1)
    return network.double()


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, grid):
    """RoPE token by token: the first half of the channels by the row, the second by the column, adjacent pairs."""
    out = x.clone()
    half = x.shape[-1] // 2
    for token in range(grid * grid):
        for part, position in enumerate(divmod(token, grid)):
            for i in range(half // 2):
                angle = position * 10000 ** (-2 * i / half)
                a, b = part * half + 2 * i, part * half + 2 * i + 1
                out[:, token, a] = x[:, token, a] * math.cos(angle) - x[:, token, b] * math.sin(angle)
                out[:, token, b] = x[:, token, b] * math.cos(angle) + x[:, token, a] * math.sin(angle)
    return out


def plain_block(state, prefix, x, condition, heads, grid):
    def linear(name, x):
        return x @ state[f"{prefix}.{name}.weight"].T + state[f"{prefix}.{name}.bias"]

    shift1, scale1, gate1, shift2, scale2, gate2 = linear("adaLN_modulation.1", F.silu(condition)).chunk(6, -1)
    h = rms(x, state[f"{prefix}.norm1.weight"]) * (1 + scale1) + shift1
    q, k, v = (part.chunk(heads, -1) for part in linear("attn.qkv", h).chunk(3, -1))
    mixed = []
    for i in range(heads):
        weights = (turned(q[i], grid) @ turned(k[i], grid).transpose(1, 2) / q[i].shape[-1] ** 0.5).softmax(-1)
        mixed.append(weights @ v[i])
    x = x + gate1 * linear("attn.proj", torch.cat(mixed, -1))
    h = rms(x, state[f"{prefix}.norm2.weight"]) * (1 + scale2) + shift2
    a, b = linear("mlp.w12", h).chunk(2, -1)
    return x + gate2 * linear("mlp.w3", F.silu(a) * b)


def plain_network(state, shape, z, t, labels):
    """The released module written down from its description, on released names."""
    grid = z.shape[-1]
    tokens = z.flatten(2).transpose(1, 2)

    def linear(name, x):
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    angles = t[:, None] * state["t_embedder.W"] * 2 * math.pi
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat((angles.sin(), angles.cos()), -1))))
    both = (time + state["y_embedder.embedding_table.weight"][labels])[:, None]
    positions = sincos_table(grid, shape.width).double()
    if shape.head_depth:
        s = linear("s_embedder.proj", tokens) + positions
        for i in range(shape.depth):
            s = plain_block(state, f"blocks.{i}", s, F.silu(both), shape.heads, grid)
        condition = linear("s_projector", F.silu(time[:, None] + s))
        x = linear("x_embedder.proj", tokens)
        for i in range(shape.depth, shape.depth + shape.head_depth):
            x = plain_block(state, f"blocks.{i}", x, condition, shape.head_heads, grid)
    else:
        condition, x = both, linear("x_embedder.proj", tokens) + positions
        for i in range(shape.depth):
            x = plain_block(state, f"blocks.{i}", x, condition, shape.heads, grid)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(condition)).chunk(2, -1)
    x = linear("final_layer.linear", rms(x, state["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    return x.transpose(1, 2).reshape(len(z), -1, grid, grid)


@pytest.mark.parametrize("shape", [TINY, TINY_PLAIN], ids=["dit-dh", "lightning-dit"])
def test_the_network_computes_what_the_specification_says(shape):
    network = filled(shape)
    released = network_to_released(network.state_dict(), shape)
    z, t, labels = torch.randn(2, 5, 3, 3).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([1, 4])
    with torch.no_grad():
        out, expected = network(z, t, labels), plain_network(released, shape, z, t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)  # the rotations' tables are float32


def test_labels_times_and_tokens_reach_the_output():
    network = filled(TINY)
    z, t, labels = torch.randn(1, 5, 3, 3).double(), torch.tensor([0.2]).double(), torch.tensor([1])
    with torch.no_grad():
        out = network(z, t, labels)
        assert (network(z, t, torch.tensor([2])) - out).abs().max() > 1e-3
        assert (network(z, t + 0.3, labels) - out).abs().max() > 1e-3
        far = z.clone()
        far[..., 2, 2] += 1
        assert (network(far, t, labels) - out)[..., 0, 0].abs().max() > 1e-4


def test_initial_weights_are_the_released_codes():
    torch.manual_seed(0)
    network = LatentDiT(NetworkShape(96, 2, 4, 128, 1, 4), 64, 4, 10)
    block = network.blocks[0]
    assert (
        not block.modulation.weight.any()
        and not network.final.linear.weight.any()
        and not network.final.modulation.weight.any()
    )
    # PyTorch's default: uniform up to 1 / sqrt(inputs)
    assert block.attn.qkv.weight.abs().max().item() == pytest.approx(96**-0.5, rel=0.01)
    assert block.attn.qkv.bias.any() and network.project.bias.any()
    assert (
        network.embed.weight.abs().max().item() == pytest.approx((6 / (96 + 64)) ** 0.5, rel=0.01)
        and not network.embed.bias.any()
    )
    assert (
        network.time_embed.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
        and network.time_embed.mlp[0].bias.any()
    )
    xavier = LatentDiT(NetworkShape(96, 2, 4, 128, 1, 4), 64, 4, 10, xavier=True)
    for other in (xavier, LatentDiT(NetworkShape(96, 2, 4, *PLAIN), 64, 4, 10)):
        qkv = other.blocks[0].attn.qkv
        assert qkv.weight.abs().max().item() == pytest.approx((6 / (4 * 96)) ** 0.5, rel=0.01) and not qkv.bias.any()
        assert not other.time_embed.mlp[0].bias.any()
    with torch.no_grad():
        assert not network(torch.randn(2, 64, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)).any()


# -- released files ----------------------------------------------------------------------------------------------------


def released(shape):
    network = filled(shape).float()
    return network, network_to_released(network.state_dict(), shape)


def test_rotations_of_released_files_are_those_of_eva_in_float32():
    """Their tables: frequencies, positions and angles all in float32."""
    grid, head_dim = 16, 72
    half = head_dim // 2
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2).float() / half))
    angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (n, half)
    table = torch.cat(
        (angles[:, None].expand(grid, grid, half), angles[None].expand(grid, grid, half)), dim=-1
    ).reshape(grid * grid, head_dim)
    for wave, ours in zip((table.cos(), table.sin()), rope_table(grid, head_dim).unbind(-1), strict=True):
        torch.testing.assert_close(ours.repeat_interleave(2, dim=-1), wave, atol=3e-6, rtol=0)


TINY_EQUAL = NetworkShape(24, 2, 2, 24, 1, 3)


@pytest.mark.parametrize("shape", [TINY, TINY_PLAIN, TINY_EQUAL], ids=["dit-dh", "lightning-dit", "equal-widths"])
def test_a_released_network_round_trips_and_tells_its_numbers(shape):
    network, state = released(shape)
    assert recognise(state, shape.head_depth) == shape
    if shape is TINY_EQUAL:
        with pytest.raises(UserError, match=r"both 24 wide.*model\.head_depth"):
            recognise(state)
    else:
        assert recognise(state) == shape
    loaded = network_from_released(state, network.state_dict(), shape)
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.items())


def test_the_released_names_are_those_of_the_published_table():
    state = network_to_released(on_meta(DIT_DH["xl"]).state_dict(), DIT_DH["xl"])
    expected = {
        "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (2048, 768, 1, 1),
        "s_embedder.proj.weight": (1152, 768, 1, 1), "s_projector.bias": (2048,),
        "t_embedder.W": (256,), "t_embedder.mlp.0.weight": (1152, 512),
        "t_embedder.mlp.2.bias": (1152,), "y_embedder.embedding_table.weight": (1001, 1152),
        "enc_feat_rope.freqs_cos": (256, 72),
        "dec_feat_rope.freqs_sin": (256, 128), "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.27.mlp.w12.weight": (6144, 1152),
        "blocks.27.mlp.w3.weight": (1152, 3072), "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        "blocks.28.norm1.weight": (2048,),
        "blocks.29.mlp.w12.weight": (10922, 2048), "blocks.29.adaLN_modulation.1.bias": (12288,),
        "final_layer.norm_final.weight": (2048,),
        "final_layer.linear.weight": (768, 2048), "final_layer.adaLN_modulation.1.weight": (4096, 2048),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_a_network_of_other_numbers_is_refused_with_the_settings_that_differ():
    network, state = released(TINY)
    with pytest.raises(UserError, match=r"model.depth=3, the file has 2.*model.head_heads=2, the file has 4"):
        network_from_released(state, network.state_dict(), TINY._replace(depth=3, head_heads=2))
    with pytest.raises(UserError, match=r"model\.head_depth=0, the file has 2"):
        network_from_released(state, network.state_dict(), TINY._replace(head_width=0, head_depth=0, head_heads=0))


def test_missing_extra_and_misplaced_tensors_are_refused():
    network, state = released(TINY)
    ours = network.state_dict()
    del state["blocks.1.mlp.w3.bias"]
    state["blocks.1.extra"] = torch.zeros(2)
    with pytest.raises(
        UserError, match=r"2 keys differ:\n  missing blocks.1.mlp.w3.bias \(\d+,\)\n  not known blocks.1.extra"
    ):
        network_from_released(state, ours, TINY)
    _, state = released(TINY)
    state["enc_feat_rope.freqs_cos"] = state["enc_feat_rope.freqs_cos"].flip(0)
    with pytest.raises(UserError, match=r"enc_feat_rope.freqs_cos .* another layout"):
        network_from_released(state, ours, TINY)
    _, state = released(TINY)
    state["pos_embed"] = state["pos_embed"].flip(1)
    with pytest.raises(UserError, match=r"pos_embed .* another layout"):
        network_from_released(state, ours, TINY)
    with pytest.raises(UserError, match="not the state dict of a released DiT-DH"):
        network_from_released({"weight": torch.zeros(2)}, ours, TINY)


# -- the width rule ----------------------------------------------------------------------------------------------------

CHANNELS, SIDE = 16, 2


def overfit(shape, steps=250, batch=32, lr=1e-2):
    """The mean loss of the last 50 steps of a network that learns one latent of 16 channels by heart, and its bound."""
    torch.manual_seed(0)
    latent = torch.randn(1, CHANNELS, SIDE, SIDE)
    network = LatentDiT(shape, CHANNELS, SIDE, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)
    labels, losses = torch.zeros(batch, dtype=torch.int64), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 10 * (step + 1) / steps, 1.1 - step / steps)
        t, noise = torch.rand(batch), torch.randn(batch, CHANNELS, SIDE, SIDE)
        x = latent.expand_as(noise)
        loss = (network(interpolate(x, noise, t), t, labels) - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    covariance = torch.eye(CHANNELS) + torch.cov(latent[0].flatten(1), correction=0)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    return sum(losses[-50:]) / 50, eigenvalues[shape.head_width or shape.width :].sum().item() / CHANNELS


def test_a_network_narrower_than_its_tokens_cannot_learn_even_one_latent():
    """The last layer has rank d: the velocity's covariance beyond its d largest eigenvalues stays as loss;
    a wide head mends it.
    """
    narrow, bound = overfit(NetworkShape(8, 1, 2, *PLAIN))
    wide, none = overfit(NetworkShape(32, 1, 2, *PLAIN))
    headed, no_bound = overfit(NetworkShape(8, 1, 2, 32, 1, 2))
    # (16 - 8) / 16: four tokens have three directions, all among the eight
    assert none == no_bound == 0 and bound == pytest.approx(0.5, abs=1e-4)
    assert bound < narrow < 1
    assert wide < 0.2 * bound and headed < 0.5 * bound
