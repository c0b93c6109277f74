"""JiT against the authors' module (fixtures made with it on a CPU in float32)
and files laid out as the released ones.
"""

import argparse
import math

import numpy as np
import pytest
import torch
from jit_models import TINY, make, wave

from pixlat.common.errors import UserError
from pixlat.common.seeds import Noise
from pixlat.methods.jit.config import JiTSample
from pixlat.methods.jit.reference import Architecture, open_checkpoint, read_checkpoint, recognise


def released_shapes(depth, width, heads, patch, bottleneck, context, hidden, classes=1000):
    """Names and shapes of the released state dict, written down from its published table."""
    shapes = {
        "in_context_posemb": (1, context, width),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "x_embedder.proj1.weight": (bottleneck, 3, patch, patch),
        "x_embedder.proj2.weight": (width, bottleneck, 1, 1), "x_embedder.proj2.bias": (width,),
        "final_layer.norm_final.weight": (width,),
        "final_layer.linear.weight": (3 * patch**2, width), "final_layer.linear.bias": (3 * patch**2,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    block = {
        "norm1.weight": (width,), "norm2.weight": (width,),
        "attn.q_norm.weight": (width // heads,), "attn.k_norm.weight": (width // heads,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.w12.weight": (2 * hidden, width), "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (width, hidden), "mlp.w3.bias": (width,),
        "adaLN_modulation.1.weight": (6 * width, width), "adaLN_modulation.1.bias": (6 * width,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {f"net.{name}": shape for name, shape in (shapes | blocks).items()}


def released_positions(grid, width):
    """The table in the released file: NumPy float64, column half first."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    table = np.concatenate([f(index[:, None] * omega) for index in (columns, rows) for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


def fixture_weights():
    """The fixture's weights: sorted names, element j of name k is 0.1 sin(0.7 j + k), plus 1 for norms."""
    state = {"net.pos_embed": released_positions(4, 96)}
    for k, (name, shape) in enumerate(sorted(released_shapes(4, 96, 6, 8, 24, 5, 256).items())):
        values = 0.1 * np.sin(0.7 * np.arange(math.prod(shape)) + k)
        state[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape) + (1.0 if "norm" in name else 0.0)
    return state


@pytest.fixture(scope="module")
def official():
    """The fixture's model, loaded as a released checkpoint would be."""
    method = make(**TINY, noise_scale=2.0)
    method.load_state_dict(method.from_reference(fixture_weights()))
    return method.eval()


class FixedNoise(Noise):
    """The fixture's initial noise, before the noise scale."""

    def __init__(self):
        super().__init__([0, 1])

    def normal(self, *shape):
        return wave(0.29)


def assert_fixture(images, first, second, mean, std, tolerance):
    torch.testing.assert_close(images[0, :, 5, 9], torch.tensor(first), atol=tolerance, rtol=0)
    torch.testing.assert_close(images[1, :, 31, 0], torch.tensor(second), atol=tolerance, rtol=0)
    assert images.mean().item() == pytest.approx(mean, abs=1e-6)
    assert images.std().item() == pytest.approx(std, abs=2e-6)


# -- the authors' module -----------------------------------------------------------------------------------------------


def test_fixture_has_the_released_number_of_tensors():
    assert len(fixture_weights()) == 15 + 14 * 4
    assert len(make(**TINY).state_dict()) == 15 + 14 * 4


def test_position_table_matches_fixture(official):
    values = official.network.pos_embed[0, 6, [0, 1, 24, 48, 49, 72]]
    torch.testing.assert_close(
        values, torch.tensor([0.909297, 0.978402, -0.416147, 0.841471, 0.629797, 0.540302]), atol=1e-6, rtol=0
    )
    assert torch.equal(official.network.pos_embed, released_positions(4, 96))


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_forward_matches_fixture(official, attention):
    method = make(**TINY, attention=attention).eval()
    method.load_state_dict(official.state_dict())
    with torch.no_grad():
        output = method.network(wave(0.13), torch.tensor([0.1, 0.97]), torch.tensor([1, 1000]))
    assert_fixture(output, [0.36951, 0.59513, -0.70886], [-1.78696, 0.28180, 1.67665], -0.0069788, 1.006889, 1e-5)


def test_loss_matches_fixture(official):
    with torch.no_grad():
        loss = official.objective(wave(0.13), torch.tensor([1, 1000]), 1 - torch.tensor([0.1, 0.97]), 2 * wave(0.29))
    assert loss.item() == pytest.approx(333.7865, abs=2e-4)


def test_sampler_matches_fixture(official):
    with torch.no_grad():
        images = official.sample(torch.tensor([1, 7]), FixedNoise(), JiTSample(guidance=3.0))
    assert_fixture(images, [0.38170, -0.08302, -0.25757], [-1.52321, 0.42816, 1.29759], -0.0047346, 0.739205, 1e-5)


# -- released files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def released_file(tmp_path):
    """A file laid out as the released ones."""
    weights = fixture_weights()
    state = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    content = {
        "model": weights,
        "model_ema1": {name: tensor if name == "net.pos_embed" else tensor + 1 for name, tensor in weights.items()},
        "model_ema2": {name: tensor if name == "net.pos_embed" else tensor + 2 for name, tensor in weights.items()},
        "optimizer": {"state": {0: state}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.95), "params": [0]}]},
        "epoch": 599,
        "args": argparse.Namespace(model="JiT-B/16", img_size=256, noise_scale=1.0, class_num=1000),
    }
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth"


@pytest.mark.parametrize(("weights", "offset"), [("model", 0), ("model_ema1", 1), ("model_ema2", 2)])
def test_released_file_loads(released_file, weights, offset):
    method = make(**TINY)
    method.load_state_dict(method.from_reference(read_checkpoint(released_file.parent, weights)))
    expected = fixture_weights()["net.blocks.3.mlp.w12.weight"] + offset
    assert torch.equal(method.network.blocks[3].mlp.w12.weight, expected)


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        ({"args": argparse.Namespace(ema_decay1=0.9998, ema_decay2=0.5)}, (0.9998, 0.5, None)),
        ({"args": {"ema_decay1": 0.9998}}, (0.9998, None, None)),
        ({"args": argparse.Namespace(ema_decay1="fast")}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_the_decays_are_the_files_own(settings, decays, tmp_path):
    content = {name: {"w": torch.zeros(1)} for name in ("model_ema1", "model_ema2", "model")}
    torch.save(content | settings, tmp_path / "checkpoint-last.pth")
    assert tuple(open_checkpoint(tmp_path, name)[1] for name in content) == decays


def test_architecture_is_recognised(released_file):
    state = read_checkpoint(released_file)
    assert recognise(state) == Architecture(
        depth=4, width=96, heads=6, patch=8, bottleneck=24, context_tokens=5, num_classes=1000, image_size=32
    )


def test_foreign_keys_are_all_listed(official):
    state = fixture_weights()
    del state["net.blocks.2.norm1.weight"], state["net.final_layer.linear.bias"]
    state["net.blocks.4.norm1.weight"] = torch.ones(96)
    state["net.x_embedder.proj2.weight"] = torch.zeros(96, 24)
    with pytest.raises(UserError) as error:
        official.from_reference(state)
    assert "4 keys differ" in str(error.value)
    for fault in (
        "missing net.blocks.2.norm1.weight (96,)",
        "missing net.final_layer.linear.bias (192,)",
        "not known net.blocks.4.norm1.weight (96,)",
        "net.x_embedder.proj2.weight is (96, 24), expected (96, 24, 1, 1)",
    ):
        assert fault in str(error.value)


def test_foreign_position_table_is_refused(official):
    state = fixture_weights()
    state["net.pos_embed"] = state["net.pos_embed"].reshape(1, 4, 4, 96).transpose(1, 2).reshape(1, 16, 96)
    with pytest.raises(UserError, match="another layout"):
        official.from_reference(state)


class Trap:
    """An object whose unpickling would run code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"model_ema1": {}, "args": Trap(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: not a readable checkpoint"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_unusable_files_are_named(tmp_path, released_file):
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    (tmp_path / "cut.pth").write_bytes(released_file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pth: not a readable checkpoint"):
        read_checkpoint(tmp_path / "cut.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: holds no 'model_ema1'.*model, epoch"):
        read_checkpoint(tmp_path / "other.pth")
    with pytest.raises(UserError, match="Did you mean 'model_ema1'"):
        read_checkpoint(released_file, "ema1")
    with pytest.raises(UserError, match="not the state dict of a released JiT"):
        recognise({"pos_embed": torch.zeros(1)})
