"""pMF against numbers of the authors' code (section 16 of the specification)
and files laid out as the released ones.
"""

import math

import pytest
import torch
from pmf_models import TINY, draws_of, fixture_method, make, wave

from pixlat.common.accounting.macs import count_macs, on_meta, parameter_counts, sampling_cost
from pixlat.common.config.resolve import load_presets
from pixlat.common.errors import UserError
from pixlat.common.training.ema import Ema
from pixlat.common.weights.tensors import read_tensors
from pixlat.methods.base import DataInfo
from pixlat.methods.pmf.config import SPEC, PMFConfig, PMFSample
from pixlat.methods.pmf.flax_archive import flatten_tree
from pixlat.methods.pmf.method import PMFMethod
from pixlat.methods.pmf.network import Condition
from pixlat.methods.pmf.objective import power_law, squared_error
from pixlat.methods.pmf.reference import ROPE, V_HEAD, Architecture, flax_layout, recognise, to_released, torch_layout

PRESETS = load_presets(SPEC.presets)

# -- numbers of the authors' code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("jvp", ["fused", "func"])
def test_forward_matches_fixture(jvp):
    method = fixture_method(jvp=jvp)
    t = torch.tensor([0.9, 0.02])
    condition = Condition(*map(torch.tensor, ([0.6, 0.02], [3, 1.5], [0.1, 0], [0.7, 1], [1, 1000])))
    with torch.no_grad():
        u, _, v = method.velocities(wave(0.13, 2), t, condition, dz=torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(u[0, :, 5, 9], torch.tensor([-1.40528, -0.40379, 0.13675]), atol=1e-5, rtol=0)
    torch.testing.assert_close(v[1, :, 31, 0], torch.tensor([-23.79217, 16.18266, 39.40176]), atol=3e-5, rtol=0)
    assert u.std().item() == pytest.approx(16.75570, abs=1e-5) and v.std().item() == pytest.approx(16.71450, abs=1e-5)


@pytest.mark.parametrize("jvp", ["fused", "func"])
def test_training_step_matches_fixture(jvp):
    method = fixture_method(jvp=jvp)
    draws = draws_of(
        2, 2 * wave(0.29, 4), t=[0.9, 0.02, 0.95, 0.6], r=[0.9, 0.02, 0.3, 0.1], omega=[1.5, 3, 7, 2],
        t_min=[0, 0, 0.1, 0.4], t_max=[1, 1, 0.7, 0.9], dropped=[True, False, False, False],
    )  # fmt: skip
    x, labels = wave(0.13, 4), torch.tensor([1, 2, 3, 4])
    fields = method.fields(x, labels, draws)
    assert squared_error(fields.u_at_t, fields.target).tolist() == pytest.approx(
        [5.5270e3, 1.7203e6, 2.5791e3, 9.1013e3], rel=2e-5
    )
    assert squared_error(fields.v, fields.target).tolist() == pytest.approx(
        [5.4054e3, 1.7108e6, 4.9451e3, 1.2678e4], rel=3e-5
    )
    torch.testing.assert_close(fields.u[2, :, 5, 9], torch.tensor([-0.10135, -0.95583, -0.18173]), atol=6e-6, rtol=0)
    loss = method.objective(x, labels, draws)["loss"]
    assert loss.item() == pytest.approx(1.999997, abs=1e-6)
    loss.backward()
    assert math.sqrt(sum(p.grad.double().square().sum().item() for p in method.parameters())) == pytest.approx(
        4.91508, abs=1e-5
    )


def test_guidance_law_and_average_match_fixture():
    half = torch.tensor(0.5, dtype=torch.float64)
    assert power_law(half, 8.0, 1.0).item() == pytest.approx(2.828427, abs=5e-7)
    assert power_law(half, 8.0, 2.0).item() == pytest.approx(1.777778, abs=5e-7)
    ema = Ema("500000img", {}, halflife_images=500_000, rampup=0.05)
    assert ema.beta(1024, 1024) == pytest.approx(9.5367e-07, rel=1e-5)
    assert ema.beta(10_000 * 1024, 1024) == pytest.approx(0.99858144, abs=5e-9)


# -- sizes and costs ---------------------------------------------------------------------------------------------------

TABLE = [
    ("256-b", 118_234_240, 175_474_304, 33.33, 50.05), ("512-b", 120_300_928, 179_312_768, 33.86, 51.03),
    ("256-l", 410_320_768, 511_789_696, 116.37, 145.60), ("512-l", 412_977_280, 516_807_808, 117.05, 146.88),
    ("256-h", 955_508_992, 1_113_904_640, 270.36, 315.60), ("512-h", 959_050_240, 1_120_397_312, 271.26, 317.26),
]  # fmt: skip


def closed_form(config):
    """MACs of one evaluation with 16 x 16 image tokens."""
    c, p, b, n = config.width, config.patch, config.bottleneck, 276
    hidden = config.mlp_hidden or 8 * c // 3
    layers = config.depth * (n * (4 * c**2 + 3 * c * hidden) + 2 * n**2 * c)
    return 256 * (3 * p**2 * b + b * c) + layers + 256 * 3 * p**2 * c + 4 * (256 * c + c**2)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("size", "inference", "training", "gmacs", "gmacs_training"), TABLE)
def test_parameters_and_macs_of_every_size(size, inference, training, gmacs, gmacs_training):
    config = PMFConfig(**{**PRESETS[f"imagenet{size}"]["model"], "perceptual": "none"})
    method = on_meta(PMFMethod, config, DataInfo("imagenet", 1000, 16 * config.patch, 1_281_167))
    counts = parameter_counts(method)
    assert (counts.gen_trainable, counts.gen_total, counts.decoder, counts.aux_train_only) == (
        inference,
        inference,
        0,
        training - inference,
    )
    assert sum(p.numel() for p in method.parameters()) == training
    cost = sampling_cost(method, PMFSample())
    assert cost.nfe == 1 and cost.net_forwards == {"network": 1.0}
    assert cost.macs_per_image == closed_form(config) and cost.macs_per_image / 1e9 == pytest.approx(gmacs, abs=0.0055)
    scalars = [empty(1) for _ in range(4)]
    condition = Condition(*scalars, empty(1, dtype=torch.int64))

    def both_heads():
        tokens, _ = method.network.shared(
            method.network.embed(empty(1, 3, 16 * config.patch, 16 * config.patch), condition)
        )
        method.network.head(tokens, method.network.rope)
        method.v_head(tokens, method.network.rope)

    with torch.no_grad():
        assert count_macs(both_heads) / 1e9 == pytest.approx(gmacs_training, abs=0.0055)


@pytest.mark.parametrize(("patch", "size"), [(4, 64), (64, 1024)])
def test_other_resolutions_keep_their_tokens(patch, size):
    config = PMFConfig(patch=patch)
    method = on_meta(PMFMethod, config, DataInfo("imagenet", 1000, size, 1_281_167))
    assert method.network.pos_embed.shape == (1, 276, 768)
    assert sampling_cost(method, PMFSample()).macs_per_image == closed_form(config)


# -- released files ----------------------------------------------------------------------------------------------------


def released_shapes(depth, heads_depth, width, hidden, bottleneck, patch, head_dim, image_tokens=256, v_head=False):
    """Names and shapes of the released PyTorch dict, written down from its published table."""
    outputs = 3 * patch**2
    shapes = {
        "time_tokens": (1, 4, width),
        "class_tokens": (1, 8, width),
        "omega_tokens": (1, 4, width),
        "t_min_tokens": (1, 2, width),
    }
    shapes |= {
        "t_max_tokens": (1, 2, width),
        "pos_embed": (1, 20 + image_tokens, width),
        "rope_freqs": (image_tokens, head_dim // 2),
    }
    shapes |= {"x_embedder.proj1.weight": (bottleneck, 3, patch, patch), "x_embedder.proj1.bias": (bottleneck,)}
    shapes |= {"x_embedder.proj2.weight": (width, bottleneck, 1, 1), "x_embedder.proj2.bias": (width,)}
    for name in ("h_embedder", "omega_embedder", "cfg_t_start_embedder", "cfg_t_end_embedder"):
        shapes |= {f"{name}.mlp.0._flax_linear.weight": (width, 256), f"{name}.mlp.0._flax_linear.bias": (width,)}
        shapes |= {f"{name}.mlp.2._flax_linear.weight": (width, width), f"{name}.mlp.2._flax_linear.bias": (width,)}
    shapes["y_embedder.embedding_table._flax_embedding.weight"] = (1001, width)
    block = {"attn_scale": (width,), "mlp_scale": (width,), "norm1.weight": (width,), "norm2.weight": (width,)}
    block |= {f"attn.{name}_proj._flax_linear.weight": (width, width) for name in ("q", "k", "v", "out")}
    block |= {
        "attn.q_norm.weight": (head_dim,),
        "attn.k_norm.weight": (head_dim,),
        "mlp.w2._flax_linear.weight": (width, hidden),
    }
    block |= {"mlp.w1._flax_linear.weight": (hidden, width), "mlp.w3._flax_linear.weight": (hidden, width)}
    stacks = {"shared_blocks": depth - heads_depth, "u_heads": heads_depth} | (
        {"v_heads": heads_depth} if v_head else {}
    )
    for final in ("u_final_layer", "v_final_layer")[: 1 + v_head]:
        shapes |= {
            f"{final}.norm.weight": (width,),
            f"{final}.linear._flax_linear.weight": (outputs, width),
            f"{final}.linear._flax_linear.bias": (outputs,),
        }
    shapes |= {
        f"{stack}.{i}.{name}": shape
        for stack, count in stacks.items()
        for i in range(count)
        for name, shape in block.items()
    }
    return {f"net.{name}": shape for name, shape in shapes.items()}


def test_released_names_and_shapes_of_b16():
    method = on_meta(PMFMethod, PMFConfig(), DataInfo("imagenet", 1000, 256, 1))
    expected = released_shapes(16, 8, 768, 2048, 128, 16, 64)
    assert len(expected) == 239
    found = {name: tuple(tensor.shape) for name, tensor in to_released(method).items()}
    assert {name: shape for name, shape in found.items() if not name.startswith(V_HEAD)} == expected
    assert found == released_shapes(16, 8, 768, 2048, 128, 16, 64, v_head=True)


def assert_same_weights(method, other):
    for (name, a), (_, b) in zip(method.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", [dict, flax_layout])
def test_round_trip_through_both_layouts(layout):
    method, other = fixture_method(), make(**TINY)
    other.load_state_dict(other.from_reference(layout(to_released(method))))
    assert_same_weights(method, other)


def test_flax_names_and_shapes():
    state = to_released(fixture_method())
    tree = flax_layout(state)
    assert ROPE not in tree and len(tree) == 111
    for name, shape in {
        "net/shared_blocks_0/attn/q_proj/_flax_linear/kernel": (96, 96),
        "net/u_heads_1/mlp/w1/_flax_linear/kernel": (96, 256),
        "net/v_heads_0/norm1/kernel": (96,), "net/cfg_t_start_embedder/mlp/layers_0/_flax_linear/kernel": (256, 96),
        "net/h_embedder/mlp/layers_2/_flax_linear/bias": (96,),
        "net/x_embedder/proj1/kernel": (8, 8, 3, 128), "net/x_embedder/proj2/kernel": (1, 1, 128, 96),
        "net/y_embedder/embedding_table/embedding": (1, 1001, 96),
        "net/u_final_layer/linear/_flax_linear/kernel": (96, 192),
        "net/class_tokens": (1, 8, 96),
        "net/shared_blocks_1/attn/k_norm/kernel": (16,), "net/shared_blocks_1/attn_scale": (96,),
    }.items():  # fmt: skip
        assert tree[name].shape == shape, name
    kernel = tree["net/x_embedder/proj1/kernel"]
    assert kernel[3, 5, 1, 7] == state["net.x_embedder.proj1.weight"][7, 1, 3, 5]
    wrapped = {
        name.replace("embedding_table/embedding", "embedding_table/_flax_embedding/embedding"): tensor
        for name, tensor in tree.items()
    }
    assert torch_layout(wrapped).keys() == torch_layout(tree).keys() == state.keys() - {ROPE}


def test_a_tree_of_arrays_is_flattened():
    tree = {"net": {"class_tokens": torch.ones(1, 2, 3), "u_heads_0": {"attn_scale": torch.zeros(3)}}}
    flat = flatten_tree(tree)
    assert flat.keys() == {"net/class_tokens", "net/u_heads_0/attn_scale"} and flat["net/class_tokens"].shape == (
        1,
        2,
        3,
    )


def test_a_released_file_loads(tmp_path):
    method, other = fixture_method(), make(**TINY)
    torch.save(to_released(method), tmp_path / "pMF-B-16.pt")
    other.load_state_dict(other.from_reference(read_tensors(tmp_path / "pMF-B-16.pt")))
    assert_same_weights(method, other)


@pytest.mark.parametrize("layout", [dict, flax_layout])
def test_a_file_for_sampling_leaves_the_v_head_alone(layout):
    method, other = fixture_method(), make(**TINY)
    state = layout({name: tensor for name, tensor in to_released(method).items() if not name.startswith(V_HEAD)})
    before = {name: p.clone() for name, p in other.v_head.named_parameters()}
    other.load_state_dict(other.from_reference(state))
    assert_same_weights(method.network, other.network)
    assert all(torch.equal(p, before[name]) for name, p in other.v_head.named_parameters())


def test_foreign_keys_are_all_listed():
    method = fixture_method()
    state = to_released(method)
    del state["net.u_heads.1.norm1.weight"], state["net.v_heads.0.attn_scale"], state[ROPE]
    state["net.shared_blocks.2.norm1.weight"] = torch.ones(96)
    state["net.x_embedder.proj2.weight"] = torch.zeros(96, 128)
    with pytest.raises(UserError) as error:
        method.from_reference(state)
    assert "5 keys differ" in str(error.value)
    for fault in (
        "missing net.u_heads.1.norm1.weight (96,)",
        "missing net.v_heads.0.attn_scale (96,)", "missing net.rope_freqs (16, 8)",
        "not known net.shared_blocks.2.norm1.weight (96,)",
        "net.x_embedder.proj2.weight is (96, 128), expected (96, 128, 1, 1)",
    ):  # fmt: skip
        assert fault in str(error.value)
    tree = flax_layout(to_released(method))
    del tree["net/u_heads_1/norm1/kernel"]
    with pytest.raises(UserError, match=r"1 keys differ \(PyTorch's names and shapes\)"):
        method.from_reference(tree)


def test_another_rotation_is_refused():
    method = fixture_method()
    state = to_released(method)
    state[ROPE] = state[ROPE].reshape(4, 4, 8).transpose(0, 1).reshape(16, 8)
    with pytest.raises(UserError, match="another layout"):
        method.from_reference(state)


@pytest.mark.parametrize("layout", [dict, flax_layout])
def test_architecture_is_recognised(layout):
    expected = Architecture(
        depth=4,
        head_depth=2,
        width=96,
        heads=6,
        mlp_hidden=256,
        patch=8,
        bottleneck=128,
        num_classes=1000,
        image_size=32,
    )
    assert recognise(layout(to_released(fixture_method()))) == expected
    with pytest.raises(UserError, match="not the state dict of a released pMF"):
        recognise({"pos_embed": torch.zeros(1)})
