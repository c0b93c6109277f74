"""Frozen encoders: exact procedures at small size through the real code path, strict weights,
and errors that say what to get.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from pixlat.common.accounting.macs import count_macs
from pixlat.common.errors import UserError
from pixlat.common.frozen import efficientnet_lite0 as lite0
from pixlat.common.frozen.base import IMAGENET_MEAN, IMAGENET_STD, channel_constants
from pixlat.common.frozen.encoders import build_encoder, encoder_names
from pixlat.common.frozen.encoders_timm import TIMM_ENCODERS, TimmEncoder
from pixlat.common.frozen.encoders_transformers import HUB_ENCODERS, TransformersEncoder
from pixlat.common.frozen.perceptual import EmbeddedDistance

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_CONFIGS = {
    "dinov2-reg-b": SMALL | {"image_size": 70},  # 5 x 5 positions, resampled
    "siglip2-b": SMALL | {"intermediate_size": 32, "image_size": 64},
    "mae-b": SMALL | {"intermediate_size": 32, "image_size": 48},
}
SMALL_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def images(n=2, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomise(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator) + (p.ndim == 1)
    return network.eval()


def save(state, folder):
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return str(folder)


def small_spec(name):
    return dataclasses.replace(HUB_ENCODERS[name], config=HUB_ENCODERS[name].config | SMALL_CONFIGS[name])


@pytest.fixture(scope="module")
def library():
    """The transformers library's own small networks, with random weights, the final norm's included."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for name in SMALL_CONFIGS:
        spec = small_spec(name)
        config = getattr(transformers, f"{spec.family}Config")(**spec.config)
        made[name] = randomise(getattr(transformers, f"{spec.family}Model")(config))
    return made


def expected_tokens(name, network, x, size):
    """The written-out procedure of spec/rae.md section 1, with the library's network as it is,
    up to the tokens (B, prefix + N, C).
    """
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if name != "siglip2-b" else ((0.5,) * 3, (0.5,) * 3)
    pixels = (x + 1) / 2
    if size != x.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    pixels = (pixels - channel_constants(mean)) / channel_constants(std)
    norm = network.post_layernorm if name == "siglip2-b" else network.layernorm
    seen = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    options = {"dinov2-reg-b": {}, "siglip2-b": {"interpolate_pos_encoding": True}}.get(name)
    if options is None:
        count = (size // 16) ** 2
        options = {"interpolate_pos_encoding": True, "noise": torch.arange(count).float().repeat(len(x), 1)}
    with torch.no_grad():
        network(pixels, **options)
    hook.remove()
    centred = seen[-1] - seen[-1].mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize(("name", "size", "dropped"), [("dinov2-reg-b", 56, 5), ("siglip2-b", 64, 0), ("mae-b", 64, 1)])
def test_transformers_encoders_follow_raes_procedure(library, tmp_path, name, size, dropped):
    encoder = TransformersEncoder(name, small_spec(name), save(library[name].state_dict(), tmp_path))
    encoder.load()
    found = encoder.represent(images())
    tokens = expected_tokens(name, library[name], images(), size)
    patches = tokens[:, dropped:]
    assert found.tokens.shape == (2, 16, 4, 4) and encoder.grid(64) == 4
    assert torch.allclose(found.tokens, patches.transpose(1, 2).reshape(2, 16, 4, 4), atol=1e-5)
    assert torch.allclose(found.pooled, tokens[:, 0] if dropped else patches.mean(1), atol=1e-5)
    assert torch.equal(encoder(images()), found.tokens) and torch.equal(encoder.pooled(images()), found.pooled)
    assert found.tokens.mean(1).abs().max() < 1e-5
    assert (found.tokens.var(1, unbiased=False) - 1).abs().max() < 1e-3
    assert len(encoder.sha256) == 64 and not encoder.network.training


def old_dinov2(name):
    """The names in files written by transformers 4."""
    for new, old in (
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
        ("o_proj", "output.dense"),
    ):
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name


def old_mae(name):
    """As released: inside the pre-training network, with the names of transformers 4."""
    name = (
        old_dinov2(name)
        .replace("layers.", "encoder.layer.")
        .replace("mlp.fc1", "intermediate.dense")
        .replace("mlp.fc2", "output.dense")
    )
    return f"vit.{name}"


RELEASED = {
    "dinov2-reg-b": (old_dinov2, {}),
    "siglip2-b": (
        lambda name: f"vision_model.{name}",
        {"text_model.head.bias": (3,), "logit_scale": (1,), "vision_model.head.probe": (1, 1, 16)},
    ),
    "mae-b": (old_mae, {"decoder.mask_token": (1, 1, 8), "decoder.decoder_pred.weight": (4, 8)}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_load(library, tmp_path, capfd, name):
    rename, more = RELEASED[name]
    state = {rename(key): value for key, value in library[name].state_dict().items() if not key.startswith("head.")}
    (tmp_path / "new").mkdir()
    expected = TransformersEncoder(name, small_spec(name), save(library[name].state_dict(), tmp_path / "new"))
    found = TransformersEncoder(
        name, small_spec(name), save(state | {key: torch.zeros(shape) for key, shape in more.items()}, tmp_path)
    )
    for encoder in (expected, found):
        encoder.load()
    assert torch.equal(found(images()), expected(images()))
    captured = capfd.readouterr()
    assert "Loading" not in captured.err and "UNEXPECTED" not in captured.out + captured.err


def test_weights_that_do_not_fit_are_refused(library, tmp_path):
    state = dict(library["dinov2-reg-b"].state_dict())
    faults = {
        "missing": state.pop("embeddings.cls_token"),
        "unexpected": state.setdefault("more.weight", torch.zeros(2)),
    }
    state["embeddings.register_tokens"] = torch.zeros(1, 2, 16)
    encoder = TransformersEncoder("dinov2-reg-b", small_spec("dinov2-reg-b"), save(state, tmp_path))
    with pytest.raises(
        UserError, match=r"model.safetensors does not fit Dinov2WithRegistersModel, 3 keys differ"
    ) as caught:
        encoder.load()
    assert all(kind in str(caught.value) for kind in (*faults, "mismatched")) and "embeddings.cls_token" in str(
        caught.value
    )


# -- timm --------------------------------------------------------------------------------------------------------------


def small_timm(name):
    return dataclasses.replace(TIMM_ENCODERS[name], options=SMALL_TIMM)


def test_timm_dinov2_follows_repas_procedure(tmp_path):
    """Spec/sit_repa_reg.md section 6: positions resampled once to the input's grid, normalise,
    then resize, affine final norm.
    """
    import timm
    from timm.layers import resample_abs_pos_embed

    spec = small_timm("timm-dinov2-b")
    trained = randomise(spec.make())
    encoder = TimmEncoder("timm-dinov2-b", spec, save(trained.state_dict(), tmp_path))
    encoder.load()
    fixed = timm.create_model(spec.architecture, num_classes=0, img_size=56, **SMALL_TIMM).eval()
    state = trained.state_dict()
    fixed.load_state_dict(
        state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], (4, 4), num_prefix_tokens=1)}
    )
    pixels = ((images() + 1) / 2 - channel_constants(IMAGENET_MEAN)) / channel_constants(IMAGENET_STD)
    with torch.no_grad():
        tokens = fixed.forward_features(F.interpolate(pixels, size=(56, 56), mode="bicubic", align_corners=False))
    found = encoder.represent(images())
    assert torch.equal(found.pooled, tokens[:, 0])
    assert torch.equal(found.tokens, tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))


def test_timm_takes_the_authors_file(tmp_path):
    spec = small_timm("timm-dinov2-b")
    trained = randomise(spec.make())
    torch.save(trained.state_dict() | {"mask_token": torch.zeros(1, 32)}, tmp_path / "dinov2_vitb14_pretrain.pth")
    encoder = TimmEncoder("timm-dinov2-b", spec, str(tmp_path / "dinov2_vitb14_pretrain.pth"))
    encoder.load()
    assert torch.equal(encoder.network.pos_embed, trained.pos_embed)
    save({key: value for key, value in trained.state_dict().items() if key != "norm.bias"}, tmp_path)
    with pytest.raises(UserError, match=r"missing norm.bias \(32,\)"):
        TimmEncoder("timm-dinov2-b", spec, str(tmp_path)).load()


def test_timm_dinov3_has_its_rotary_table(tmp_path):
    spec = small_timm("timm-dinov3-b")
    trained = randomise(spec.make())
    encoder = TimmEncoder("timm-dinov3-b", spec, save(trained.state_dict(), tmp_path))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    encoder.load()
    assert torch.equal(torch.get_rng_state(), before)
    pixels = ((images() + 1) / 2 - channel_constants(IMAGENET_MEAN)) / channel_constants(IMAGENET_STD)
    with torch.no_grad():
        tokens = trained.forward_features(pixels)
    found = encoder.represent(images())
    assert torch.equal(found.pooled, tokens[:, 0]) and torch.equal(
        found.tokens.flatten(2).transpose(1, 2), tokens[:, 5:]
    )


# -- embedded ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    encoder = build_encoder("embedded")
    encoder.load()
    return encoder


def test_embedded_encoder_is_the_normalised_fifth_stage(embedded):
    x = images(3, 32)
    with torch.no_grad():
        output = lite0.EfficientNetLite0()(lite0.resize((x + 1) * 127.5))
    stage = output.teacher
    expected = (stage - stage.mean(1, keepdim=True)) / (stage.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    found = embedded.represent(x)
    assert found.tokens.shape == (3, 112, 8, 8) and embedded.grid(32) == embedded.grid(256) == 8
    assert torch.allclose(found.tokens, expected, atol=1e-5)
    assert torch.equal(found.pooled, output.pooled) and embedded.pooled_channels == 320
    assert torch.equal(embedded(x), found.tokens) and torch.equal(embedded.pooled(x), found.pooled)
    assert torch.allclose(embedded(x[1:2]), found.tokens[1:2], atol=1e-5)
    assert (embedded.name, embedded.num_parameters(), embedded.sha256) == ("embedded", 4_631_000, lite0.WEIGHTS_SHA256)


def test_embedded_networks_stop_behind_what_is_asked_for():
    """Tokens and perceptual distance need five of the seven stages: two thirds of the pooled features' MACs."""
    with torch.device("meta"):
        encoder, distance, x = build_encoder("embedded"), EmbeddedDistance(size=128), torch.empty(1, 3, 128, 128)
        by_stages = [count_macs(lambda n=n: encoder.network.stages(x, n)) for n in range(1, 8)]
        assert (
            count_macs(lambda: encoder(x))
            == by_stages[4]
            < 0.7 * by_stages[6]
            == 0.7 * count_macs(lambda: encoder.represent(x))
        )
        assert count_macs(lambda: distance(x, x)) == 2 * by_stages[4]


def test_embedded_encoder_passes_no_gradient_and_ignores_autocast(embedded):
    x = images(1, 32).requires_grad_()
    expected = embedded(x)
    assert not expected.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedded(x), expected)
    assert not any(module.training for module in embedded.train().modules())


# -- all of them -------------------------------------------------------------------------------------------------------

REAL = {  # of the released networks: parameters, channels
    "dinov2-reg-s": (22_057_344, 384),
    "dinov2-reg-b": (86_582_016, 768),
    "siglip2-b": (85_841_664, 768),
    "mae-b": (85_797_120, 768),
    "timm-dinov2-b": (86_579_712, 768),
    "timm-dinov3-s": (21_586_944, 384),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_on_the_meta_device(name):
    params, channels = REAL[name]
    before = torch.get_rng_state()
    with torch.device("meta"):
        encoder = build_encoder(name)
        for size in (256, 512):
            found = encoder.represent(torch.empty(2, 3, size, size))
            assert found.tokens.shape == (2, channels, size // 16, size // 16) and found.pooled.shape == (
                2,
                encoder.pooled_channels,
            )
    assert (encoder.name, encoder.num_parameters(), encoder.sha256) == (
        name,
        params,
        None,
    ) and encoder.channels == channels
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["embedded", "dinov2-reg-s", "mae-b", "timm-dinov2-s"])
def test_memory_can_be_estimated_with_fake_tensors(name):
    with FakeTensorMode():
        assert build_encoder(name)(torch.empty(2, 3, 32, 32)).shape[0] == 2


@pytest.mark.parametrize("name", sorted(set(encoder_names()) - {"embedded"}))
def test_a_missing_file_names_its_repository(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = HUB_ENCODERS.get(name) or TIMM_ENCODERS[name]
    if name.endswith(("-l", "-g")):  # building 300 million parameters tells nothing new
        small = {"options": SMALL_TIMM} if name in TIMM_ENCODERS else {"config": spec.config | SMALL}
        encoder = (TimmEncoder if name in TIMM_ENCODERS else TransformersEncoder)(
            name, dataclasses.replace(spec, **small)
        )
    else:
        encoder = build_encoder(name)
    with pytest.raises(UserError) as caught:
        encoder.load()
    for part in (
        "model.safetensors or pytorch_model.bin",
        f"hf download {spec.repository} model.safetensors",
        str(tmp_path),
        spec.licence,
    ):
        assert part in str(caught.value)


def test_unknown_names_and_sizes():
    with pytest.raises(
        UserError, match=r"'dinov2-b' is not known. Did you mean 'dinov2-reg-b'.*Encoders: embedded, dinov2-reg-s"
    ):
        build_encoder("dinov2-b")
    with pytest.raises(UserError, match=r"data.image_size=40 is not a multiple of 16"):
        build_encoder("timm-dinov2-s").grid(40)


def test_heavy_libraries_are_imported_late():
    code = (
        "import sys, pixlat.common.frozen.encoders, pixlat.common.frozen.perceptual; "
        "sys.exit(bool({'transformers', 'diffusers', 'lpips'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
