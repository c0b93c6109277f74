"""Frozen networks on GPUs and compiled: the layout of their weights, graphs apart from the blocks',
and the same numbers.
"""

import dataclasses

import pytest
import torch
from test_encoders import SMALL_CONFIGS, SMALL_TIMM
from test_tokenizer import TINY_SD
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import settings

from pixlat.common.config.resolve import resolve
from pixlat.common.frozen.base import Frozen, lay_channels_last
from pixlat.common.frozen.encoders import EmbeddedEncoder
from pixlat.common.frozen.encoders_timm import TIMM_ENCODERS, TimmEncoder
from pixlat.common.frozen.encoders_transformers import HUB_ENCODERS, TransformersEncoder
from pixlat.common.frozen.perceptual import ConvNeXtDistance, EmbeddedDistance, Lpips
from pixlat.common.frozen.store_latents import encoder_digest
from pixlat.common.frozen.tokenizer import SdTokenizer, build_tokenizer
from pixlat.common.training import compiled
from pixlat.common.training.compiled import compile_frozen
from pixlat.common.training.setup import prepare_blocks
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

SMALLER_SD = TINY_SD | {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def small_dino() -> TransformersEncoder:
    spec = HUB_ENCODERS["dinov2-reg-b"]
    return TransformersEncoder(
        "dinov2-reg-b", dataclasses.replace(spec, config=spec.config | SMALL_CONFIGS["dinov2-reg-b"])
    )


def small_timm() -> TimmEncoder:
    spec = TIMM_ENCODERS["timm-dinov2-b"]
    return TimmEncoder("timm-dinov2-b", dataclasses.replace(spec, options=SMALL_TIMM))


MAKERS = {
    "sd": lambda: SdTokenizer("sd-ft-ema", None, SMALLER_SD),
    "autoencoder": lambda: build_tokenizer("embedded"),
    "lpips": Lpips,
    "convnext": lambda: ConvNeXtDistance(None, (1, 1, 2, 1), (4, 8, 12, 16)),
    "embedded distance": EmbeddedDistance,
    "embedded encoder": EmbeddedEncoder,
    "dinov2 of transformers": small_dino,
    "dinov2 of timm": small_timm,
}
CONVOLUTIONAL = [name for name in MAKERS if not name.startswith("dinov2")]


def made_up(make) -> Frozen:
    """The network with numbers in the place of its file's."""
    network = make()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    # weights about as large as trained ones, so that a deep network neither dies out nor overflows
                    scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
                    values = scale * torch.randn(tensor.shape, generator=generator) + (
                        tensor.ndim == 1 and key == "weight"
                    )
                    tensors[key] = (
                        nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
                    )
    return network


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def outputs(network: Frozen, count: int = 2) -> list[torch.Tensor]:
    """Everything that the network says of some images, and for distances the gradient."""
    if hasattr(network, "encode_moments"):
        mean, std = network.encode_moments(images(count))
        return [mean, std, network.decode(mean)]
    if hasattr(network, "represent"):
        return [*network.represent(images(count)), network(images(count))]
    x = images(count).requires_grad_()
    distance = network(x, images(count, seed=1))
    return [distance.detach(), torch.autograd.grad(distance.sum(), x)[0].contiguous()]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0 and a.stride() == b.stride()


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_last_changes_no_number_but_for_rounding(name):
    network = made_up(MAKERS[name])
    state = {key: value.clone() for key, value in network.state_dict().items()}
    digest = encoder_digest(network) if hasattr(network, "encoder") else None
    expected = outputs(network)
    lay_channels_last(network)
    large = [
        layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d) and min(layer.weight.shape[1:]) > 1
    ]
    assert large and all(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous() for weight in large
    )
    assert_close(outputs(network), expected)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert digest is None or digest == encoder_digest(network)


def test_on_a_cpu_weights_stay_as_they_were_loaded_and_on_a_gpu_they_lie_channels_last(monkeypatch):
    network = made_up(MAKERS["sd"])
    expected, strides = outputs(network), [p.stride() for p in network.parameters()]
    outer = nn.Sequential(network).to("cpu").float()
    assert [p.stride() for p in network.parameters()] == strides
    assert all(torch.equal(a, b) for a, b in zip(outputs(network), expected, strict=True))
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)  # this machine has no GPU
    outer.to("cpu")
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(found.is_contiguous() for found in outputs(network))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that dynamo has made, which then run as plain torch."""
    found: list[str] = []

    def backend(module, inputs):
        found.append("block" if any("w12" in str(node.target) for node in module.graph.nodes) else "frozen")
        return module.forward

    torch.compiler.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("name", MAKERS)
def test_compiled_frozen_networks_say_the_same(name, graphs):
    network = made_up(MAKERS[name])
    with sdpa_kernel(SDPBackend.MATH):
        expected = outputs(network)
        compile_frozen(nn.Sequential(network))
        compile_frozen(nn.Sequential(network))  # a second start compiles nothing twice
        assert_close(outputs(network), expected)
        assert graphs
        many = len(graphs)
        outputs(network, 3)
        outputs(network, 5)
        assert len(graphs) <= 2 * many  # the batch size became a symbol


def sit_settings():
    return resolve(get_spec("sit"), {"model.depth": "2", "model.remember": "false"}).model


def test_frozen_networks_leave_the_blocks_their_graphs(graphs, monkeypatch):
    """Blocks may have one graph here, and the frozen encoder of a demo has several."""
    monkeypatch.setattr(compiled, "GRAPHS_AT_MOST", 1)
    torch.manual_seed(0)
    method = get_class("sit")(sit_settings(), DataInfo("test", 3, 32, 100))
    method.load_external()
    batch = {"image": images()[..., :32, :32], "label": torch.tensor([0, 1]), "index": torch.tensor([0, 1])}
    torch.manual_seed(1)
    expected = method.train()("main", batch, 0)["loss"]
    prepare_blocks(method, settings(compile=True))
    assert torch.backends.cudnn.benchmark and "forward" in vars(method.tokenizer.encoder)
    torch.manual_seed(1)
    found = method("main", batch, 0)["loss"]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and len(graphs) > 1
    prepare_blocks(method, settings())
    assert not torch.backends.cudnn.benchmark
