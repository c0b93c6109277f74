"""Perceptual distances against the libraries that define them, and the paired crops against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import vgg16

from pixlat.common.errors import UserError
from pixlat.common.frozen import perceptual
from pixlat.common.frozen.efficientnet_lite0 import EfficientNetLite0
from pixlat.common.frozen.perceptual import ConvNeXtDistance, EmbeddedDistance, GlobalResponseNorm, Lpips
from pixlat.common.maths.crops import CropBoxes, draw_crops, keys_cubic, paired_crop

DEPTHS, WIDTHS = (1, 1, 2, 1), (4, 8, 12, 16)


def images(n=2, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomise(module, seed=0):
    """Weights that let every layer matter: convolutions and linear maps keep the scale,
    the rest varies about its default.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = (2 / p[0].numel()) ** 0.5 if p.ndim > 1 and "grn" not in name else 0.2
        p.data = scale * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return module.eval()


# -- crops -------------------------------------------------------------------------------------------------------------


def test_drawn_boxes_follow_the_distribution():
    torch.manual_seed(0)
    size = 64
    box = draw_crops(20_000, size, "cpu")
    for side, offset in ((box.height, box.top), (box.width, box.left)):
        assert torch.equal(side, side.round()) and side.min() >= 1 and side.max() == size
        assert torch.equal(offset, offset.round()) and offset.min() == 0 and (offset + side).max() == size
    area = box.height * box.width / size**2
    # clipping takes a little off the largest
    assert 0.07 < area.min() < 0.09 and area.mean() == pytest.approx(0.54, abs=0.02)
    aspect = (box.width / box.height)[area < 0.5].log() / math.log(4 / 3)  # too small to be clipped
    assert aspect.abs().max() < 1.25  # rounding a side of 16 pixels moves the aspect
    assert abs(aspect.mean()) < 0.02 and aspect.std() == pytest.approx(1 / 3**0.5, abs=0.02)  # uniform in [-1, 1]
    counts = torch.bincount(box.top[box.height == 48].long())
    # every row can be the first, the last one too
    assert len(counts) == 17 and counts.min() > 0.5 * counts.float().mean()


def test_whole_image_boxes_resize_as_torch_does():
    x = images(2, 40)
    box = CropBoxes(*(torch.full((2,), value) for value in (0.0, 0.0, 40.0, 40.0)))
    for size in (24, 40, 56):
        (found,) = paired_crop([x], box, size)
        # Keys' a = -0.5 and the same edges
        expected = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        assert torch.allclose(found, expected, atol=2e-6)


def direct_crop(image, top, left, height, width, size):
    """One channel, written out: output pixel by output pixel, in float64."""

    def weights(offset, length, side):
        rows = []
        for o in range(size):
            centre, reach = (o + 0.5) * length / size + offset - 0.5, max(length / size, 1.0)
            row = [float(keys_cubic(torch.tensor(abs(centre - j) / reach, dtype=torch.float64))) for j in range(side)]
            rows.append([w / sum(row) for w in row])
        return torch.tensor(rows, dtype=torch.float64)

    return weights(top, height, image.shape[0]) @ image.double() @ weights(left, width, image.shape[1]).T


def test_crops_follow_the_formula():
    x = images(3, 20)
    box = CropBoxes(
        *(torch.tensor(values) for values in ([0.0, 5.0, 12.0], [3.0, 0.0, 9.0], [19.0, 7.0, 8.0], [6.0, 20.0, 11.0]))
    )
    (found,) = paired_crop([x], box, 10)
    for k in range(3):
        place = [float(side[k]) for side in (box.top, box.left, box.height, box.width)]
        assert torch.allclose(found[k, 1].double(), direct_crop(x[k, 1], *place, 10), atol=1e-6)


def test_keys_cubic():
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    assert keys_cubic(x).tolist() == [1.0, 0.5625, 0.0, -0.0625, 0.0, 0.0]


def test_pixels_beside_the_box_count():
    x = torch.zeros(1, 1, 16, 16)
    x[..., :4] = 1.0  # ends where the box begins
    box = CropBoxes(*(torch.tensor([value]) for value in (0.0, 4.0, 16.0, 8.0)))
    (found,) = paired_crop([x], box, 16)
    assert found[..., 0].abs().min() > 0.05
    cropped = F.interpolate(x[..., 4:12], size=(16, 16), mode="bicubic", antialias=True)
    assert cropped.abs().max() == 0


def test_one_map_for_all_batches_of_images():
    torch.manual_seed(1)
    x, y = images(4), images(4, seed=1).requires_grad_()
    box = draw_crops(4, 32, "cpu")
    a, b, c = paired_crop([x, y, 2 * x + 1], box, 48)
    assert torch.allclose(c, 2 * a + 1, atol=1e-5)
    assert b.dtype == torch.float32 and b.shape == (4, 3, 48, 48)
    b[1].sum().backward()
    assert y.grad[1].abs().sum() > 0 and y.grad[[0, 2, 3]].abs().sum() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paired_crop([x], box, 48)[0], a)


# -- LPIPS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16 with random weights in the released layout, its classifier cut short."""
    with torch.device("meta"):
        features = nn.ModuleDict({"features": vgg16().features})
    state = randomise(features.to_empty(device="cpu")).state_dict()
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


def test_lpips_equals_the_package(vgg_file):
    lpips = pytest.importorskip("lpips")
    ours = Lpips(str(vgg_file))
    ours.load()
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # the package's heads, any backbone
    state = torch.load(vgg_file, weights_only=True)
    for index in range(30):
        if isinstance(ours.features[index], nn.Conv2d):
            layer = next(m for name, m in theirs.net.named_modules() if name.endswith(f".{index}"))
            layer.weight.data, layer.bias.data = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
    x, y = images(2, 48), images(2, 48, seed=1)
    expected = theirs.eval()(x, y).flatten()
    assert torch.allclose(ours(x, y), expected, rtol=1e-5) and expected.min() > 0.05


def test_lpips_is_a_distance_with_finite_gradients(vgg_file):
    network = Lpips(str(vgg_file.parent))
    network.load()
    # VGG16's convolutions and the five heads
    assert len(network.sha256) == 64 and network.num_parameters() == 14_714_688 + 1472
    x, y = images(2), torch.zeros(2, 3, 32, 32, requires_grad=True)
    distance = network(y, x)
    assert torch.allclose(distance, network(x, y)) and network(x, x).abs().max() == 0
    distance.sum().backward()
    assert torch.isfinite(y.grad).all() and y.grad.abs().sum() > 0
    dead = torch.zeros(1, 4, 3, 3, requires_grad=True)  # no channel fires
    perceptual.unit_channels(dead).square().sum().backward()
    assert torch.equal(dead.grad, torch.zeros_like(dead))


def test_lpips_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"vgg16-397923af.pth is needed and not in torch's hub cache.*curl -L .*download.pytorch.org"
    ):
        Lpips().load()
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips"):
        perceptual.lpips_heads()


# -- ConvNeXt V2 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    """The transformers library's network, small, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(depths=DEPTHS, hidden_sizes=WIDTHS, layer_norm_eps=1e-6)
    return randomise(transformers.ConvNextV2Model(config), seed=3)


@pytest.mark.parametrize("prefix", ["convnextv2.", ""])
def test_convnext_equals_transformers(theirs, tmp_path, prefix):
    state = {prefix + name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state | {"classifier.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    ours = ConvNeXtDistance(str(tmp_path), DEPTHS, WIDTHS)
    ours.load()
    x, y = images(2, 64), images(2, 64, seed=1)
    with torch.no_grad():
        a, b = theirs(x).pooler_output, theirs(y).pooler_output
        assert torch.allclose(ours.network(x), a, atol=2e-5)  # the norm's 1e-6 under the root is what differs
        assert torch.allclose(ours(x, y), (a - b).square().sum(1), rtol=1e-4)
    assert (a - b).square().sum(1).min() > 0.1


def test_convnext_has_the_released_names():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(depths=perceptual.CONVNEXT_DEPTHS, hidden_sizes=perceptual.CONVNEXT_WIDTHS)
    with torch.device("meta"):
        released = perceptual.rename_convnext(transformers.ConvNextV2Model(config).state_dict())
    ours = ConvNeXtDistance().network.state_dict()
    assert {name: tensor.shape for name, tensor in released.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }
    # timm's names pass
    assert perceptual.rename_convnext(ours | {"head.fc.weight": torch.zeros(1)}).keys() == ours.keys()


def test_convnext_norms_have_the_papers_eps():
    network = ConvNeXtDistance(None, DEPTHS, WIDTHS).network
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    norm = randomise(GlobalResponseNorm(5))
    x = 1e-3 * images(2, 4).flatten(1).view(2, 4, 4, 3).repeat(1, 1, 1, 2)[..., :5]  # so small that eps matters
    expected = torch.empty_like(x)
    for b in range(2):
        lengths = [math.sqrt(float((x[b, :, :, c].double() ** 2).sum()) + 1e-6) for c in range(5)]
        for c in range(5):
            ratio = lengths[c] / (sum(lengths) / 5 + 1e-6)
            expected[b, :, :, c] = norm.weight[c] * x[b, :, :, c] * ratio + norm.bias[c] + x[b, :, :, c]
    assert torch.allclose(norm(x), expected, atol=1e-7)


def test_convnext_says_what_is_missing(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"facebook/convnextv2-base-22k-224 .*hf download facebook/convnextv2-base-22k-224 model.safetensors",
    ):
        ConvNeXtDistance().load()


# -- the embedded distance ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    network = EmbeddedDistance()
    network.load()
    return network


def test_embedded_distance_follows_its_formula(embedded):
    x, y = images(2, 64), images(2, 64, seed=1)
    lite0 = EfficientNetLite0()
    a, b = (lite0.stages((image + 1) * 127.5) for image in (x, y))
    terms = [1 - F.cosine_similarity(a[k], b[k], dim=1).mean((1, 2)) for k in (0, 1, 2, 4)]
    pooled = 1 - F.cosine_similarity(a[4].mean((2, 3)), b[4].mean((2, 3)))
    assert torch.allclose(embedded(x, y), 2 * (sum(terms) / 4 + pooled), rtol=1e-4)


def test_embedded_distance_orders_distortions(embedded):
    x = F.interpolate(images(4, 8), size=(32, 32), mode="bilinear")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    weak, strong = embedded(x, x + 0.05 * noise), embedded(x, x + 0.3 * noise)
    other = embedded(x, x.flip(0))
    assert embedded(x, x).abs().max() < 1e-6
    assert (weak < strong).all() and weak.mean() < 0.5 * other.mean()
    assert torch.allclose(strong, embedded(x + 0.3 * noise, x), rtol=1e-4)
    assert torch.allclose(
        strong, torch.cat([embedded(x[k : k + 1], (x + 0.3 * noise)[k : k + 1]) for k in range(4)]), rtol=1e-4
    )


def test_embedded_distance_has_a_gradient_everywhere(embedded):
    x, y = images(1), (1.5 * images(1, seed=1)).requires_grad_()  # partly outside [-1, 1], where clipping would stop it
    embedded(y, x).sum().backward()
    assert (y.grad != 0).float().mean() > 0.99
    length = y.grad.norm()
    with torch.no_grad():
        step = 0.05 * y.grad / length
        numeric = (embedded(y + step, x) - embedded(y - step, x)) / 0.1
    # along the gradient; the step crosses kinks of ReLU6
    assert float(length) == pytest.approx(float(numeric), rel=0.05)


def test_embedded_distance_at_other_sizes(embedded):
    small = EmbeddedDistance(32)
    small.load()
    x, y = images(2), images(2, seed=1)
    assert (small(x, y) - embedded(x, y)).abs().min() > 1e-3
    shrunk = [
        F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
        for image in (images(2, 96), images(2, 96, seed=1))
    ]
    assert torch.allclose(small(images(2, 96), images(2, 96, seed=1)), small(*shrunk), rtol=1e-4)


# -- all of them -------------------------------------------------------------------------------------------------------

MAKERS = {"lpips": Lpips, "convnext": lambda: ConvNeXtDistance(None, DEPTHS, WIDTHS), "embedded": EmbeddedDistance}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_distances_build_without_weights(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = make()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in network.parameters()) and not any(
        module.training for module in network.train().modules()
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        network(images(1), images(1))  # without weights there is no distance
    with torch.device("meta"):
        assert make()(torch.empty(3, 3, 64, 64), torch.empty(3, 3, 64, 64)).shape == (3,)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(3, 3, 64, 64, requires_grad=True)
        found = make()(x, torch.empty(3, 3, 64, 64))
        assert found.shape == (3,) and found.dtype == torch.float32 and found.requires_grad


def test_distances_do_not_depend_on_autocast(embedded):
    x, y = images(2), images(2, seed=1)
    expected = embedded(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedded(x.bfloat16().float(), y), embedded(x.bfloat16(), y))
        assert torch.equal(embedded(x, y), expected)
