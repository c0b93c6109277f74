"""What every registered method must do, on a small data shape; a new method is tested by being registered."""

import itertools
import sys

import pytest
import torch
from torch import nn

from pixlat.common.accounting.macs import empty_batch, on_meta, parameter_counts, sampling_cost, training_cost
from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.common.frozen.base import Frozen
from pixlat.common.maths.adversarial import augment, quantise
from pixlat.common.seeds import Noise, image_seeds, seed_step
from pixlat.evaluation.score.embedded import evaluate_method  # noqa: F401  the evaluator must import beside every method
from pixlat.evaluation.studies.block_features import image_mean, tapped
from pixlat.launch.job.dry_run import describe_run
from pixlat.methods import get_class, get_spec, registered
from pixlat.methods.base import DataInfo, Method

INFO = DataInfo("synthetic", num_classes=10, image_size=32, num_train=64)


@pytest.fixture(params=sorted(registered()))
def run(request):
    return resolve(get_spec(request.param), {"method": request.param, "data.name": "synthetic"})


@pytest.fixture
def method(run) -> Method:
    torch.manual_seed(0)
    built = get_class(run.method)(run.model, INFO)
    load_packaged(built)
    with torch.no_grad():  # zero-initialised layers would hide what is behind them
        for p in built.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.05)
    return built


def load_packaged(method: Method) -> None:
    """The frozen networks that come with packages; decoders and guides of other runs keep their random weights."""
    for name in method.external:
        modules = method.get_submodule(name)
        for module in modules.children() if isinstance(modules, nn.ModuleDict) else (modules,):
            if isinstance(module, Frozen):
                module.load()


def make_images(run, method: Method, labels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Samples; of a stage that does not generate, the reconstructions of noise images."""
    noise = Noise(seeds)
    if method.task == "generation":
        return method.sample(labels, noise, run.sample)
    return method.decode(method.encode(noise.normal(INFO.channels, INFO.image_size, INFO.image_size).clamp(-1, 1)))


def batch(size: int) -> dict[str, torch.Tensor]:
    filled = empty_batch(INFO, size, "cpu")
    generator = torch.Generator().manual_seed(0)
    filled["image"].uniform_(-1, 1, generator=generator)
    filled["label"].random_(INFO.num_classes, generator=generator)
    return filled


def test_each_phase_gives_a_finite_loss_and_gradients_to_its_parameters(method):
    for phase in method.phases:
        seed_step(0, 0, 0)
        out = method(phase, batch(16), 0)
        assert out["loss"].isfinite() and out["loss"].requires_grad
        assert all(not value.requires_grad for name, value in out.items() if name != "loss")
        out["loss"].backward()
        for group in method.parameters_of(phase):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in group.params)
        method.zero_grad(set_to_none=True)


# Settings that switch on what a demo leaves out: every phase of a method and every term that its loss
# may have from the first image on.
EVERYTHING_ON = {
    "vae": {"model.adversarial": "0.5", "model.adversarial_start": "64", "model.discriminator_widths": "[8,16]"},
    "dsd": {"model.gan_weight": "0.1", "model.gan_start": "64", "model.discriminator_widths": "[8,16]"},
    "rae_decoder": {"model.discriminator": "light", "model.discriminator_start": "64", "model.gan_start": "128"},
}


@pytest.fixture(params=sorted(registered()))
def full_method(request) -> Method:
    """Each method with all of its phases."""
    name = request.param
    run = resolve(get_spec(name), {"data.name": "synthetic", **EVERYTHING_ON.get(name, {})})
    torch.manual_seed(0)
    built = get_class(name)(run.model, INFO)
    load_packaged(built)
    assert built.phases == get_class(name).phases, "a phase that is off in the demo needs settings in EVERYTHING_ON"
    return built


@pytest.mark.parametrize("started", [False, True])
def test_every_phase_goes_forward_and_backward_under_bf16_autocast(full_method, started):
    method = full_method.train()
    images_seen = max([0, *method.turning_points()]) if started else 0
    method.begin_step(images_seen)
    for phase in (phase for phase in method.phases if method.phase_active(phase, images_seen)):
        seed_step(0, 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            out = method(phase, batch(4), 0)
        assert out["loss"].dtype == torch.float32 and all(value.isfinite().all() for value in out.values())
        out["loss"].backward()
        owned = [p for group in method.parameters_of(phase) for p in group.params]
        assert any(p.grad is not None and p.grad.any() for p in owned)
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
        method.zero_grad(set_to_none=True)
    assert all(value.isfinite().all() for value in method.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("full_method", sorted(EVERYTHING_ON), indirect=True)
def test_under_bf16_the_discriminator_sees_grey_levels(full_method, monkeypatch):
    """What a discriminator is shown before the augmentation is rounded as real images are, real ones and fakes."""
    shown: list[torch.Tensor] = []
    module = sys.modules[type(full_method).__module__]
    monkeypatch.setattr(module, "augment", lambda images, draws: shown.append(images) or augment(images, draws))
    full_method.begin_step(1000)
    data = batch(4)
    data["image"] = quantise(data["image"])
    with torch.autocast("cpu", torch.bfloat16):
        full_method("discriminator", data, 0)
    assert len(shown) == 2
    for images in shown:
        levels = (images.double() + 1) * 127.5
        assert images.dtype == torch.float32 and (levels - levels.round()).abs().max() < 1e-4


@pytest.mark.parametrize("full_method", sorted(EVERYTHING_ON), indirect=True)
def test_to_ask_which_phases_are_active_changes_no_loss(full_method):
    def losses(asked: list[int]) -> list[float]:
        found = []
        for images_seen in (0, 1000):
            full_method.begin_step(images_seen)
            for count in asked:
                for phase in full_method.phases:
                    full_method.phase_active(phase, count)
            seed_step(0, 0, 0)
            found.append(full_method.eval()(full_method.phases[0], batch(4), 0)["loss"].item())
        return found

    assert losses([]) == losses([0, 10_000]) == losses([10_000, 0])
    assert losses([])[0] != losses([])[1]  # the adversarial term has come


def test_components_are_the_external_networks_with_their_digests(method):
    """Decoders and guides of other runs, which are not loaded here, have no digest yet."""
    components = method.components()
    assert len(components) == len(method.external)
    for module, component in zip(method.external, components, strict=True):
        network = method.get_submodule(module)
        assert component.params == sum(p.numel() for p in network.parameters()) > 0 and component.name
        assert component.used_at in ("train", "sample", "both")
        assert (component.sha256 is not None) == isinstance(network, Frozen)


def test_every_trainable_parameter_belongs_to_exactly_one_phase(method):
    owned = [id(p) for phase in method.phases for group in method.parameters_of(phase) for p in group.params]
    assert sorted(owned) == sorted(id(p) for p in method.parameters() if p.requires_grad)


def test_the_loss_depends_on_the_seed_and_on_nothing_else(method):
    def loss(seed: int) -> float:
        seed_step(seed, 0, 0)
        return method(method.phases[0], batch(4), 0)["loss"].item()

    assert loss(1) == loss(1) != loss(2)


def test_images_depend_on_their_own_seed_and_label_only(run, method):
    labels = torch.arange(6) % INFO.num_classes
    seeds = image_seeds(0, range(6))
    method.eval()
    with torch.no_grad():
        together = make_images(run, method, labels, seeds)
        alone = torch.cat([make_images(run, method, labels[i : i + 1], seeds[i : i + 1]) for i in range(6)])
    assert together.shape == (6, INFO.channels, INFO.image_size, INFO.image_size) and together.isfinite().all()
    # rounding of other matrix shapes, through the whole sampler
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[0], together[1])


def test_cost_is_counted_and_evaluations_are_those_executed(run, method):
    counted = sampling_cost(on_meta(type(method), run.model, INFO), run.sample)
    if method.task == "generation":
        assert (
            counted.nfe == method.evaluations(run.sample) <= sum(counted.net_forwards.values()) <= 2 * counted.nfe + 1
        )
    else:
        assert (
            counted.nfe == method.evaluations(run.sample) == 0
            and counted.net_forwards["decoder"] == 1
            and counted.macs_decoder > 0
        )
    assert counted.macs_per_image > 0
    training = training_cost(type(method), run.model, INFO)
    assert all(macs > 0 for _, macs in training.parts) and training.total(100, 64) > 0
    counts = parameter_counts(method)
    assert counts.gen_trainable <= counts.gen_total and counts.gen_trainable + counts.decoder > 0


def test_the_blocks_of_every_generator_can_be_listened_to(method):
    images = batch(4)["image"]
    if method.task == "reconstruction":
        with pytest.raises(UserError, match="does not implement probe"):
            method.probe(images, 0.5)
        return
    seen = {}
    for time in (0.1, 0.9):
        torch.manual_seed(0)
        with tapped(method.eval().blocks()) as outputs, torch.no_grad():
            method.probe(images, time)
        seen[time] = [image_mean(tokens) for tokens in outputs]
    assert len(seen[0.1]) == len(method.blocks()) > 0
    assert all(
        a.shape[0] == 4 and a.isfinite().all() and not torch.equal(a, b) for a, b in zip(*seen.values(), strict=True)
    )


def test_the_leaderboard_is_told_what_it_shows(run, method):
    told = method.describe(run.sample)
    assert told.prediction and told.sampler and told.steps >= (method.task == "generation")
    assert (told.guidance == "none") == (told.guidance_scale is None)
    assert method.space in ("pixel", "latent_vae", "latent_rae", "latent_self")


def test_the_state_round_trips_and_averages_follow_trained_parameters(run, method):
    torch.manual_seed(1)
    other = get_class(run.method)(run.model, INFO)
    load_packaged(other)
    other.load_state_dict(method.state_dict())
    for (name, a), (_, b) in zip(method.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert method.averaged_parameters().keys() <= dict(method.named_parameters()).keys()
    assert method.averaged_parameters()


def test_before_training_takes_an_endless_stream(method):
    method.before_training(batch(4) for _ in itertools.count())
    assert all(value.isfinite().all() for value in method.state_dict().values() if value.is_floating_point())


def test_a_dry_run_tells_odd_data():
    told = describe_run(resolve(get_spec("jit"), {"preset": "imagenet256-b", "data.path": "/not/here"}))
    assert "unknown number of (data.path=/not/here is not on this computer) training images" in told
    assert "note         data.path is null" in describe_run(resolve(get_spec("jit"), {"preset": "imagenet256-b"}))


def test_a_dry_run_describes_the_demo(run):
    told = describe_run(run)
    assert "parameters" in told and "memory" in told and " epochs" in told and "note  " not in told
