"""Adversarial losses: the numbers by hand, the augmentation pixel by pixel,
and what a discriminator keeps and changes.
"""

import copy

import pytest
import torch
from torch import nn

from pixlat.common.gan_phases import GanPhases
from pixlat.common.layers.discriminators import (
    FeatureDiscriminator,
    FeatureHead,
    PatchDiscriminator,
    TokenNorm,
    evaluating,
)
from pixlat.common.maths.adversarial import (
    Augmentation,
    adaptive_weight,
    augment,
    draw_augmentation,
    hinge_discriminator,
    hinge_generator,
    quantise,
    translate,
)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2 + 0.5) / 4))
    assert hinge_generator(fake).item() == pytest.approx(0.625)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_and_has_no_gradient():
    last = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    x = torch.tensor([0.5, -1.0])
    reconstruction, adversarial = (last @ x).square().sum(), 0.01 * (last @ x).sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    error = last.detach() @ x
    by_hand = torch.outer(2 * error, x).norm() / (0.01 * torch.outer(torch.ones(2), x).norm() + 1e-6)
    torch.testing.assert_close(weight, by_hand)
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(last.grad, torch.outer(2 * error, x) + by_hand * 0.01 * torch.outer(torch.ones(2), x))


def test_the_adaptive_weight_is_bounded():
    last = nn.Parameter(torch.ones(3))
    assert adaptive_weight((1e6 * last).sum(), (0.0 * last).sum(), last).item() == 1e4


def test_quantised_images_have_the_levels_of_bytes():
    levels = quantise(torch.linspace(-1.3, 1.3, 1001))
    bytes_ = (levels + 1) * 127.5
    torch.testing.assert_close(bytes_, bytes_.round(), atol=2e-5, rtol=0)
    assert levels.min() == -1 and levels.max() == 1
    every = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(quantise(every), every, atol=0, rtol=0)


def test_translation_moves_whole_pixels_and_leaves_zeros():
    images = torch.randn(3, 2, 5, 4)
    shift = torch.tensor([[2, -1], [0, 0], [-5, 0]])
    moved = translate(images, shift)
    for b, (down, right) in enumerate(shift.tolist()):
        for y in range(5):
            for x in range(4):
                inside = 0 <= y - down < 5 and 0 <= x - right < 4
                expected = images[b, :, y - down, x - right] if inside else torch.zeros(2)
                assert torch.equal(moved[b, :, y, x], expected)


def test_translations_reach_an_eighth_of_the_side_both_ways_and_no_further():
    torch.manual_seed(0)
    draws = draw_augmentation(4000, 256, "cpu")
    assert draws.shift.min() == -32 and draws.shift.max() == 32 and draws.shift.dtype == torch.int64
    assert abs(draws.shift.float().mean().item()) < 1  # standard error 0.2
    for u in draws[1:]:
        assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1


@pytest.mark.parametrize(("side", "reach"), [(4, 0), (20, 2), (36, 4), (52, 6), (12, 2), (32, 4), (224, 28)])
def test_translations_reach_an_eighth_of_the_side_rounded_half_to_even(side, reach):
    shift = draw_augmentation(2000, side, "cpu").shift
    assert (shift.min(), shift.max()) == (-reach, reach)


def test_losses_are_computed_in_float32_under_bf16():
    logits = torch.linspace(0, 1, 1000).bfloat16()
    assert hinge_generator(logits).item() == pytest.approx(-logits.double().mean().item(), rel=1e-6)
    assert hinge_discriminator(logits, logits).item() == pytest.approx(1.0, rel=1e-6)


def test_colour_augmentation_is_diffaugs():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 6, 6) * 2 - 1
    u = torch.tensor([[0.1, 0.9], [0.3, 0.6], [0.2, 0.7]])
    out = augment(images, Augmentation(torch.zeros(2, 2, dtype=torch.int64), *u))
    for b in range(2):
        x = images[b] + u[0, b] - 0.5
        grey = x.mean(0)
        x = (x - grey) * 2 * u[1, b] + grey
        x = (x - x.mean()) * (u[2, b] + 0.5) + x.mean()
        torch.testing.assert_close(out[b], x)
    neutral = Augmentation(torch.zeros(2, 2, dtype=torch.int64), *torch.full((3, 2), 0.5))
    torch.testing.assert_close(augment(images, neutral), images)


def test_gradients_pass_through_the_augmentation():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    draws = draw_augmentation(2, 16, "cpu")._replace(shift=torch.tensor([[2, 0], [0, 0]]))
    augment(images, draws).square().sum().backward()
    assert (images.grad[0, :, :14] != 0).all() and (images.grad[1] != 0).all()
    assert (images.grad[0, :, 14:] == 0).all()  # pushed out of the picture


def test_the_token_norm_looks_at_one_channel_of_one_sample():
    torch.manual_seed(0)
    norm = TokenNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    x = 3 * torch.randn(4, 3, 50) + 2
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    expected = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))


def test_a_head_is_the_published_one():
    torch.manual_seed(0)
    head = FeatureHead(384)
    assert sum(p.numel() for p in head.parameters()) * 5 == 7_386_245
    features = torch.randn(2, 384, 30)
    head(features)  # a power iteration, so that the logits are of order one
    with evaluating(head):
        logits = head(features)
        assert logits.shape == (2, 30)
        # Circular convolutions: turning the tokens turns the logits.
        torch.testing.assert_close(head(features.roll(7, dims=2)), logits.roll(7, dims=1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head(features[1:]), logits[1:], atol=1e-5, rtol=1e-5)


def vectors(module):
    """The singular vectors that the power iterations keep; that of a single output has converged after one."""
    return {name: value.clone() for name, value in module.layers.state_dict().items() if name.endswith("_u")}


def test_spectral_norms_are_right_before_the_first_step():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, (32, 64, 128)).eval()
    network(torch.zeros(1, 3, 16, 16))
    largest = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in (*network.layers, network.out)]
    assert largest == pytest.approx([1.0] * 4, rel=0.03)


def test_spectral_norms_are_frozen_while_evaluating_and_improve_at_each_training_forward():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, (8, 16))
    images = torch.randn(2, 3, 16, 16)
    start, twice = vectors(network), copy.deepcopy(network)
    with evaluating(network):
        network(images)
    assert network.training and all(torch.equal(value, start[name]) for name, value in vectors(network).items())
    network(images)
    once = vectors(network)
    assert all(not torch.equal(value, start[name]) for name, value in once.items())
    twice(images), twice(images)
    assert all(not torch.equal(value, once[name]) for name, value in vectors(twice).items())
    for _ in range(100):
        network(images)
    largest = torch.linalg.svdvals(network.layers[1].weight.flatten(1))[0]
    assert largest.item() == pytest.approx(1, abs=1e-3)  # power iteration has nearly converged


def test_evaluating_puts_a_module_back_as_it_was():
    module = nn.Linear(1, 1).eval()
    with evaluating(module):
        assert not module.training
    assert not module.training


def test_a_patch_discriminator_judges_patches():
    network = PatchDiscriminator(3, (8, 16, 32))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 8 * 8)
    names = set(dict(network.named_parameters()))
    assert {"layers.0.weight_orig", "out.weight_orig"} <= names


class TwoMaps(nn.Module):
    """Feature maps of two sizes."""

    def forward(self, images):
        return [images.flatten(2), images[..., ::2, ::2].repeat(1, 2, 1, 1).flatten(2)]


def test_a_feature_discriminator_has_a_head_for_each_map():
    torch.manual_seed(0)
    network = FeatureDiscriminator(TwoMaps(), (3, 6))
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, 64 + 16)
    hinge_generator(logits).backward()
    assert images.grad.abs().sum() > 0


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_discriminator_and_the_adversarial_term_start_at_their_own_images():
    gan = GanPhases()
    gan.schedule_gan(has_discriminator=True, discriminator_start=10, adversarial_start=20)
    states = []
    for images_seen in (0, 9, 10, 19, 20):
        gan.begin_step(images_seen)
        assert (
            gan.phase_active("generator", images_seen)
            and gan.phase_active("discriminator", images_seen) == gan.discriminator_active
        )
        states.append((gan.discriminator_active, gan.adversarial_active))
    assert states == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    assert gan.turning_points() == [10, 20] and gan.phases == ("generator", "discriminator")
    assert gan.schedule_images("generator", 25) == 25 and gan.schedule_images("discriminator", 25) == 15


def test_without_a_discriminator_only_the_generator_is_trained():
    gan = GanPhases()
    gan.schedule_gan(has_discriminator=False, discriminator_start=0, adversarial_start=0)
    gan.begin_step(1000)
    assert (
        gan.phases == ("generator",)
        and not gan.adversarial_active
        and not gan.phase_active("discriminator", 1000)
        and gan.turning_points() == []
    )
