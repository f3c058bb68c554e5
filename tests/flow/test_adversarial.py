import pytest
import torch

from lightning_distill.flow.adversarial import (
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
    r1_penalty,
)


@pytest.mark.parametrize("discriminator", [hinge_discriminator, logistic_discriminator])
def test_discriminator_losses_raise_real_scores_and_lower_fake_scores(discriminator) -> None:
    real, fake = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    loss = discriminator(real, fake)
    assert loss.shape == (4,)
    loss.sum().backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()


@pytest.mark.parametrize("generator", [hinge_generator, logistic_generator])
def test_generator_losses_raise_fake_scores(generator) -> None:
    fake = torch.full((4, 3), -9.0, requires_grad=True)
    loss = generator(fake)
    assert loss.shape == (4,)
    loss.sum().backward()
    assert (fake.grad < -0.3).all()  # even for very low scores


def test_hinge_loss_is_zero_beyond_the_margin() -> None:
    assert hinge_discriminator(torch.full((2, 3), 1.5), torch.full((2, 3), -1.5)).tolist() == [0.0, 0.0]


def test_r1_penalty_is_the_squared_norm_of_the_gradient() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    features = [torch.randn(4, 5, 3, requires_grad=True)]
    penalty = r1_penalty(features[0] @ weight, features)
    # the mean over 5 tokens has a fifth of the gradient at each token
    torch.testing.assert_close(penalty, torch.full((4,), 14 / 5))
    (gradient,) = torch.autograd.grad(penalty.sum(), weight)
    torch.testing.assert_close(gradient, 4 * 2 * weight / 5)
