import doctest
import random

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.data.shapes import CATEGORIES, category_prompts, render, sample_scene
from lightning_distill.metrics import AutoencoderFeatures, FrechetDistance, frechet_distance


class Flat(nn.Flatten):
    num_features = 12


def random_autoencoder(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=2.0,
        shift_factor=0.25,
    )


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    return random_autoencoder()


def blur(images: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-torch.arange(-8.0, 9.0).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = F.pad(images.flatten(0, 1)[:, None], (8, 8, 8, 8), mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(images)


def sample_images(number: int, seed: int) -> Tensor:
    rng = random.Random(seed)
    prompts = [rng.choice(category_prompts(CATEGORIES[i % len(CATEGORIES)])) for i in range(number)]
    return render([sample_scene(prompt, rng) for prompt in prompts]) / 255


def distance(features: nn.Module, real: Tensor, generated: Tensor) -> float:
    metric = FrechetDistance(features)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


def test_distance_of_a_set_to_itself_is_zero() -> None:
    images = torch.rand(500, 3, 2, 2)
    assert distance(Flat(), images, images) == pytest.approx(0, abs=1e-5)


def test_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    images, shift = torch.rand(500, 3, 2, 2), torch.randn(3, 2, 2)
    assert distance(Flat(), images, images + shift) == pytest.approx(shift.square().sum().item(), rel=1e-4)


def test_distance_of_scaled_gaussians_has_a_closed_form() -> None:
    features = torch.randn(4000, 3)
    scale = torch.tensor([1.0, 2.0, 0.5])
    # For commuting covariances the trace term is the squared difference of standard deviations.
    expected = (features.std(0) * (scale - 1)).square().sum() + (features.mean(0) * (scale - 1)).square().sum()
    assert frechet_distance(features, features * scale).item() == pytest.approx(expected.item(), rel=1e-4)


def test_batches_accumulate() -> None:
    real, generated = torch.rand(60, 3, 2, 2), torch.rand(60, 3, 2, 2)
    metric = FrechetDistance(Flat())
    for part in range(0, 60, 20):
        metric.update(real[part : part + 20], real=True)
        metric.update(generated[part : part + 20], real=False)
    assert metric.compute().item() == pytest.approx(distance(Flat(), real, generated), rel=1e-6)


def test_reset_can_keep_real_features() -> None:
    images = torch.rand(60, 3, 2, 2)
    metric = FrechetDistance(Flat(), reset_real_features=False)
    metric.update(images, real=True)
    metric.reset()
    metric.update(images, real=False)
    assert metric.compute() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_worse_images_have_a_larger_distance(seed: int) -> None:
    """A mild blur is not tested: with so few images, the bias of the estimate hides it, as the class docstring says."""
    features = AutoencoderFeatures(random_autoencoder(seed))
    real, first, second = (sample_images(600, seed=i) for i in range(3))
    baseline = distance(features, real, first)
    assert distance(features, real, blur(first, 2.0)) > 1.2 * baseline
    assert distance(features, real, (first + second) / 2) > 1.2 * baseline


def test_autoencoder_features(autoencoder: AutoencoderKL) -> None:
    features = AutoencoderFeatures(autoencoder)
    images = sample_images(3, seed=0).requires_grad_()
    output = features(images)
    assert output.shape == (3, features.num_features) == (3, 256)
    assert not output.requires_grad
    latents = autoencoder.encode(images * 2 - 1).latent_dist.mode()
    assert latents.shape == (3, 16, 8, 8)
    pooled = latents.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    torch.testing.assert_close(output, ((pooled - 0.25) * 2.0).flatten(1))


def test_autoencoder_features_stay_frozen(autoencoder: AutoencoderKL) -> None:
    metric = FrechetDistance(AutoencoderFeatures(autoencoder)).train()
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    assert not any(module.training for module in autoencoder.modules())


def test_docstring_example() -> None:
    found = doctest.DocTestFinder(recurse=False).find(FrechetDistance, "FrechetDistance", globs={})
    result = doctest.DocTestRunner().run(found[0])
    assert result.failed == 0
    assert result.attempted > 0
