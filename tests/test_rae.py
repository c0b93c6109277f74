"""RAE's second stage: statistics, times, guidance, the weights that come from elsewhere, and diffusers' layout."""

import dataclasses
import itertools
import json
import math
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from rae_models import INFO, NETWORK, batch, stage1, stage2, use_toys
from torch import nn
from toys import Killed, fit, settings, state_of

from pixlat.common.accounting.macs import on_meta, parameter_counts, sampling_cost, training_cost
from pixlat.common.config.identity import identity_of
from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.common.seeds import Noise, seed_step
from pixlat.common.training.optim import learning_rate
from pixlat.common.training.state import load_state_without_external, state_without_external
from pixlat.methods.rae.config import SPEC, RaeConfig, RaeSample
from pixlat.methods.rae.method import RaeMethod, shifted, time_grid
from pixlat.methods.rae.reference import decoder_to_released, network_to_released
from pixlat.methods.rae.statistics import denormalise, measure, normalise, read_statistics

SHIFT_256 = (768 * 16 * 16 / 4096) ** 0.5


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    use_toys(monkeypatch)


@pytest.fixture
def decoder_file(tmp_path):
    """A decoder in a released file."""
    file = tmp_path / "model.pt"
    torch.save(decoder_to_released(stage1().decoder.state_dict()), file)
    return str(file)


@pytest.fixture
def method(decoder_file):
    """A DiT-DH whose zero layers are not zero."""
    built = stage2(decoder=decoder_file)
    with torch.no_grad():
        for p in built.network.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return built.eval()


# -- statistics --------------------------------------------------------------------------------------------------------


def in_batches(latents, size):
    """Training batches whose images are the latents themselves."""
    return ({"image": part} for part in latents.split(size))


def itself(batch):
    return batch["image"]


def test_exact_statistics_are_those_of_all_latents_at_once():
    torch.manual_seed(0)
    latents = 1000 + torch.randn(70, 3, 2, 2)  # a large mean: sums of squares would lose the digits
    mean, variance = measure("exact", in_batches(latents, 33), itself, 70)
    torch.testing.assert_close(mean, latents.double().mean(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(variance, latents.double().var(0, correction=0), atol=1e-10, rtol=0)


def test_statistics_count_the_images_that_are_asked_for_and_no_more():
    torch.manual_seed(0)
    latents, taken = torch.randn(40, 1, 2, 2), []
    stream = (taken.append(i) or {"image": latents[4 * i : 4 * i + 4]} for i in itertools.count())
    mean, variance = measure("exact", stream, itself, 10)
    assert len(taken) == 3
    torch.testing.assert_close(mean, latents[:10].double().mean(0))
    torch.testing.assert_close(variance, latents[:10].double().var(0, correction=0))


def test_latents_are_wide_numbers_in_small_parts(monkeypatch):
    """No tensor in float64 is larger than a chunk: of a batch of 50, 16 latents at once."""
    largest = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda z: largest.append(len(z)) or double(z))
    measure("exact", in_batches(torch.randn(50, 1, 2, 2), 50), itself, 50)
    assert max(largest) == 16


PROCESSES = 3


def measure_in_a_process(rank, folder, kind, images):
    """Each process is given the batches of all, as by the trainer, and encodes its own."""
    store = torch.distributed.FileStore(f"{folder}/store", PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    encoded = []
    mean, variance = measure(
        kind, in_batches(wide_latents(), 4), lambda batch: encoded.append(len(itself(batch))) or itself(batch), images
    )
    torch.save((mean, variance, sum(encoded)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def wide_latents():
    """48 latents whose mean and spread change along the stream: to count some twice, or others than the first,
    shows in the first digits.
    """
    return torch.arange(1.0, 49).view(48, 1, 1, 1) ** 2 + torch.randn(
        48, 2, 2, 2, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(("kind", "images"), [("exact", 48), ("exact", 30), ("momentum", 30), ("exact", 5)])
def test_statistics_do_not_depend_on_the_number_of_processes(kind, images, tmp_path):
    arguments = (str(tmp_path), kind, images)
    # a spawned one imports for seconds
    torch.multiprocessing.start_processes(measure_in_a_process, arguments, nprocs=PROCESSES, start_method="fork")
    expected = measure(kind, in_batches(wide_latents(), 4), itself, images)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for *moments, encoded in found:
        assert encoded == 4 * math.ceil(images / 4 / PROCESSES)  # its own batches only
        for value, wanted in zip(moments, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    if kind == "exact":
        torch.testing.assert_close(
            expected[1], wide_latents()[:images].double().var(0, correction=0), rtol=1e-10, atol=0
        )


def test_momentum_statistics_are_batch_norms():
    torch.manual_seed(0)
    batches = [3 + 2 * torch.randn(8, 2, 3, 3) for _ in range(5)]
    mean, variance = measure("momentum", ({"image": z} for z in batches), itself, 40)
    expected_mean, expected_variance = torch.zeros(2, 3, 3), torch.ones(2, 3, 3)
    for z in batches:
        expected_mean = 0.9 * expected_mean + 0.1 * z.mean(0)
        expected_variance = 0.9 * expected_variance + 0.1 * z.var(0, correction=0)
    torch.testing.assert_close(mean.float(), expected_mean)
    torch.testing.assert_close(variance.float(), expected_variance)


def test_released_statistics_may_lack_a_mean(tmp_path):
    variance = torch.rand(6, 4, 4) + 0.1
    torch.save({"mean": None, "var": variance}, tmp_path / "stat.pt")
    mean, read = read_statistics(tmp_path / "stat.pt", (6, 4, 4))
    assert not mean.any() and torch.equal(read, variance)
    z = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(normalise(z, mean, read), z / (variance + 1e-5).sqrt())
    torch.testing.assert_close(denormalise(normalise(z, mean, read), mean, read), z)
    with pytest.raises(UserError, match=r"var is \(6, 4, 4\), but the latents are \(6, 8, 8\)"):
        read_statistics(tmp_path / "stat.pt", (6, 8, 8))
    torch.save({"var": variance, "std": variance}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"'std'.* not a released stat.pt"):
        read_statistics(tmp_path / "odd.pt", (6, 4, 4))


def test_before_training_the_latents_are_measured_into_the_checkpoint(decoder_file):
    method = stage2(decoder=decoder_file, stat_images=8)
    seen = [batch(4, seed=s) for s in range(3)]
    method.before_training(iter(seen))
    z = torch.cat([method.encoder(b["image"]) for b in seen[:2]])
    torch.testing.assert_close(method.latent_mean, z.mean(0))
    torch.testing.assert_close(method.latent_var, z.var(0, correction=0), atol=1e-6, rtol=1e-5)
    assert {"latent_mean", "latent_var"} <= state_without_external(method).keys()
    normalised = method.encode(torch.cat([b["image"] for b in seen[:2]]))
    assert normalised.mean(0).abs().max() < 1e-5 and (normalised.var(0, correction=0) - 1).abs().max() < 0.01
    torch.testing.assert_close(method.decode(normalised), method.decoder(z), atol=1e-5, rtol=1e-5)


def test_statistics_from_a_file_are_not_measured_again(decoder_file, tmp_path):
    torch.save({"mean": None, "var": torch.full((6, 4, 4), 2.0)}, tmp_path / "stat.pt")
    method = stage2(decoder=decoder_file, statistics=str(tmp_path / "stat.pt"))
    method.before_training(iter(()))
    assert (method.latent_var == 2).all() and not method.latent_mean.any()


# -- times and objective -----------------------------------------------------------------------------------------------


def test_the_official_grid_is_the_released_samplers():
    grid = time_grid(49, "official", SHIFT_256)
    assert len(grid) == 50 and pytest.approx(6.9282, abs=1e-4) == SHIFT_256
    assert grid[:3] == pytest.approx([1.0, 0.99701, 0.99390], abs=1e-5)
    assert grid[-2:] == pytest.approx([0.13151, 0.006887], abs=1e-5)
    assert time_grid(49, "official", 13.8564)[-1] == pytest.approx(0.01368, abs=1e-5)
    assert time_grid(50, "clean", SHIFT_256)[-1] == 0.0


def test_shifted_times_of_training_have_the_published_quantiles(decoder_file):
    method = stage2(decoder=decoder_file)
    method.shift = SHIFT_256
    torch.manual_seed(0)
    x, labels = torch.zeros(200_000, 1, 1, 1), torch.zeros(200_000, dtype=torch.int64)
    dropped, t, noise = method.draw(x, labels)
    quantiles = torch.quantile(t, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert quantiles == pytest.approx([0.572, 0.874, 0.973], abs=2e-3) and t.mean().item() == pytest.approx(
        0.837, abs=1e-3
    )
    assert (dropped == INFO.num_classes).float().mean().item() == pytest.approx(0.1, abs=3e-3)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_uniform_times_end_before_pure_noise(decoder_file):
    method = stage2(decoder=decoder_file, time="uniform", shift_base=0)
    assert method.shift == 1.0
    torch.manual_seed(0)
    t = method.draw(torch.zeros(100_000, 1, 1, 1), torch.zeros(100_000, dtype=torch.int64))[1]
    assert t.max().item() == pytest.approx(0.999, abs=1e-4) and t.max() < 0.999
    assert torch.quantile(t, 0.25).item() == pytest.approx(0.25, abs=0.01)


def test_the_shift_grows_with_the_latent(decoder_file):
    assert stage2(decoder=decoder_file).shift == pytest.approx((6 * 16 / 4096) ** 0.5)
    t = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(shifted(t, 3.0), torch.tensor([0.0, 0.9 / 1.6, 1.0]))


def test_the_objective_is_the_mean_squared_velocity_error(method):
    x, noise, t = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.8])
    labels = torch.tensor([0, 2])
    z = torch.stack([(1 - a) * b + a * c for a, b, c in zip(t, x, noise, strict=True)])
    expected = (method.network(z, t, labels) - (noise - x)).square().mean()
    torch.testing.assert_close(method.objective(x, labels, t, noise), expected)


def test_training_resumes_bit_for_bit_with_remembered_latents(tmp_path, decoder_file):
    def fresh():
        return stage2(decoder=decoder_file, remember=True, stat_images=16)

    whole = fit(fresh(), tmp_path / "whole")
    with pytest.raises(Killed):
        fit(fresh(), tmp_path / "cut", stop_after=12)
    resumed = fit(fresh(), tmp_path / "cut")
    a, b = state_of(whole), state_of(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole.method.latent_var.std() > 0


def test_remembered_latents_change_nothing(decoder_file):
    losses = []
    for remember in (True, False):
        method = stage2(decoder=decoder_file, remember=remember)
        seed_step(0, 0, 0)
        losses.append(method("main", batch(), 0)["loss"])
    assert torch.equal(*losses)


def test_shorter_presets_are_the_beginning_of_the_authors_run():
    """2e-4 for 40 epochs, then down to 2e-5 until epoch 800: 1.905e-4 at epoch 80,
    1.147e-4 at 400 (spec/rae.md section 7).
    """
    epoch = 1251 * 1024
    rates = {
        name: partial(learning_rate, resolve(SPEC, {"preset": f"imagenet{name}"}).train)
        for name in ("256-dh-xl", "256-dh-b", "512-dh-xl")
    }
    whole = [rates["256-dh-xl"](n * epoch) for n in (0, 40, 80, 400, 800)]
    assert whole == pytest.approx([2e-4, 2e-4, 1.905e-4, 1.147e-4, 2e-5], rel=4e-4)
    for name, last in (("256-dh-b", 80), ("512-dh-xl", 400)):
        assert resolve(SPEC, {"preset": f"imagenet{name}"}).train.images == last * epoch
        assert [rates[name](n * epoch) for n in (0, 30, 60, last)] == pytest.approx(
            [rates["256-dh-xl"](n * epoch) for n in (0, 30, 60, last)], rel=1e-6
        )


# -- sampling and guidance ---------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A velocity that tells which network was asked, with which labels; counts its images."""

    def __init__(self, value):
        super().__init__()
        self.value, self.images = value, 0

    def forward(self, z, t, labels):
        self.images += len(z)
        return (self.value + labels.float()).view(-1, 1, 1, 1).expand_as(z)


def guided(method, guidance, interval=(0.0, 1.0), t=0.5):
    method.network.images = 0
    config = RaeSample(guidance=guidance, interval=interval)
    v = method.velocity(torch.zeros(2, 6, 4, 4), t, torch.tensor([0, 1]), config)
    return v[:, 0, 0, 0].tolist()


def test_classifier_free_guidance_within_its_closed_interval(method):
    method.network = Constant(10.0)
    assert guided(method, 1.0) == [10, 11] and method.network.images == 2
    assert guided(method, 2.0) == pytest.approx([13 + 2 * (10 - 13), 13 + 2 * (11 - 13)]) and method.network.images == 4
    for t, on in ((0.19, False), (0.2, True), (0.6, True), (0.61, False)):
        assert (guided(method, 2.0, (0.2, 0.6), t) != [10, 11]) == on
        assert method.network.images == (4 if on else 2)


def test_autoguidance_asks_each_network_once_with_the_same_labels(method):
    method.network, method.guide = Constant(10.0), Constant(4.0)
    assert guided(method, 1.42) == pytest.approx([4 + 1.42 * 6, 5 + 1.42 * 6])
    assert method.network.images == method.guide.images == 2
    guided(method, 1.0)
    assert method.guide.images == 2


def test_sampling_is_eulers_method_in_the_normalised_space(method):
    method.set_statistics(torch.full((6, 4, 4), 0.2), torch.full((6, 4, 4), 4.0))
    labels, config = torch.tensor([1, 2]), RaeSample(steps=3)
    with torch.no_grad():
        images = method.sample(labels, Noise([3, 4]), config)
        z, grid = Noise([3, 4]).normal(6, 4, 4), time_grid(3, "official", method.shift)
        for t, after in itertools.pairwise(grid):
            z = z + (after - t) * method.network(z, torch.full((2,), t), labels)
        expected = method.decoder(z * (4 + 1e-5) ** 0.5 + 0.2)
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 8, 8) and method.evaluations(config) == 3


def test_cost_counts_network_guide_and_decoder(decoder_file):
    config = RaeConfig(
        encoder="toy", decoder_size="demo", guide="guide.pt", guide_width=8, guide_heads=2, guide_depth=1, **NETWORK
    )
    cost = sampling_cost(on_meta(RaeMethod, config, INFO), RaeSample(steps=5, guidance=1.5))
    assert cost.net_forwards == {"network": 5, "guide": 5, "decoder": 1} and cost.nfe == 5
    assert cost.macs_decoder > 0 and cost.macs_per_forward["guide"] < cost.macs_per_forward["network"]
    plain = sampling_cost(
        on_meta(RaeMethod, dataclasses.replace(config, guide=None), INFO), RaeSample(steps=5, guidance=1.5)
    )
    assert plain.net_forwards == {"network": 10, "decoder": 1}
    assert training_cost(RaeMethod, config, INFO).per_image > 0
    counts = parameter_counts(on_meta(RaeMethod, config, INFO))
    assert counts.decoder > 0 and counts.gen_trainable < counts.gen_total


def test_the_description_says_what_guides_and_on_what_it_stands(method):
    told = method.describe(RaeSample())
    assert told.guidance == "none" and told.guidance_scale is None and told.variant is None
    assert [(c.name, c.used_at) for c in told.pretrained] == [("toy", "train"), ("decoder", "sample")]
    assert len(told.pretrained[1].sha256) == 64
    assert method.describe(RaeSample(guidance=2.0)).guidance == "cfg"
    with_guide = stage2(load=False, guide="guide.pt", guide_width=8, guide_heads=2, guide_depth=1)
    told = with_guide.describe(RaeSample(guidance=2.0, ending="clean"))
    assert (
        told.guidance == "autoguidance" and told.pretrained[2].name == "guide" and told.sampler == "euler, clean ending"
    )
    assert len(with_guide.describe(RaeSample()).pretrained) == 2  # the guide stands by, but nothing is guided


# -- weights that come from elsewhere ----------------------------------------------------------------------------------


def run_folder(method, folder, name, **config):
    """A finished run of a method in a folder, as the launcher leaves it."""
    # an average that remembers its start after two steps, and is not too long for them
    train = settings(images=16, ema_decay=[0.3])
    model = dataclasses.asdict(method.config)
    saved = {"method": name, "model": model, "train": dataclasses.asdict(train), "eval": {"ema": None}, **config}
    fit(method, folder, train, identity=identity_of(json.loads(json.dumps(saved))))
    OmegaConf.save(OmegaConf.create(saved), folder / "config.yaml")
    return str(folder)


def test_the_decoder_of_a_run_is_its_average(tmp_path):
    first = stage1()
    folder = run_folder(first, tmp_path / "stage1", "rae_decoder")
    method = stage2(decoder=folder)
    start = stage1().decoder.out.weight
    assert not torch.equal(method.decoder.out.weight, first.decoder.out.weight) and not torch.equal(
        method.decoder.out.weight, start
    )
    assert not any(name.startswith(("decoder", "encoder")) for name in state_without_external(method))
    assert not any(p.requires_grad for p in method.decoder.parameters())
    assert len(method.digests["decoder"]) == 64


def test_a_run_of_other_settings_is_refused_by_the_one_that_differs(tmp_path):
    folder = run_folder(stage1(), tmp_path / "stage1", "rae_decoder")
    with pytest.raises(
        UserError, match=r"trained with model.encoder='toy', but here model.encoder='embedded'. Set model.encoder=toy"
    ):
        stage2(decoder=folder, encoder="embedded")
    with pytest.raises(UserError, match=r"trained with model.size='demo', but here model.decoder_size='b'"):
        stage2(decoder=folder, decoder_size="b")


def test_a_decoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.decoder='nowhere' does not exist"):
        stage2(decoder="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run folder"):
        stage2(decoder=str(tmp_path / "empty"))


def test_a_guide_from_a_run_brings_its_statistics(tmp_path, decoder_file):
    weak = stage2(decoder=decoder_file, width=8, stat_images=16)
    folder = run_folder(weak, tmp_path / "guide", "rae")
    method = stage2(decoder=decoder_file, guide=folder, guide_width=8, guide_depth=1, guide_heads=2)
    assert torch.equal(method.latent_var, weak.latent_var) and method.latent_var.std() > 0
    method.before_training(iter(()))
    assert (
        not any(name.startswith("guide") for name in state_without_external(method))
        and not method.train().guide.training
    )
    with pytest.raises(UserError, match=r"model.width=8, but here model.guide_width=12"):
        stage2(decoder=decoder_file, guide=folder, guide_width=12, guide_depth=1, guide_heads=1)


def test_a_released_guide_and_network_load(tmp_path, decoder_file, method):
    state = network_to_released(method.network.state_dict(), method.config.shape)
    torch.save(state, tmp_path / "stage2_model.pt")
    other = stage2(
        decoder=decoder_file, guide=str(tmp_path / "stage2_model.pt"), guide_width=16, guide_depth=1, guide_heads=2
    )
    assert torch.equal(other.guide.final.linear.weight, method.network.final.linear.weight)
    load_state_without_external(other, other.from_reference(state))
    assert all(torch.equal(a, b) for a, b in zip(other.network.parameters(), method.network.parameters(), strict=True))
    with pytest.raises(UserError, match="guide's width=8, the file has 16"):
        stage2(
            decoder=decoder_file, guide=str(tmp_path / "stage2_model.pt"), guide_width=8, guide_depth=1, guide_heads=2
        )


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"head_heads": 3}, r"model.head_heads=3: must divide model.head_width=2048"),
        ({"guide": "train"}, r"model.guide='train': must be a run folder"),
        ({"decoder_size": "m"}, r"model.decoder_size='m' is not one of"),
    ):
        with pytest.raises(UserError, match=message):
            RaeConfig(**changes)
    with pytest.raises(UserError, match=r"sample.interval"):
        RaeSample(interval=(0.5, 0.5))
    assert math.isclose(RaeConfig().head_width, 2048)
