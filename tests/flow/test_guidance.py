import pytest
import torch

from lightning_distill.flow.guidance import classifier_free, improved_mix, inside_interval


@pytest.fixture
def velocities() -> torch.Tensor:
    return torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_classifier_free_matches_hand_calculation():
    guided = classifier_free(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 2.5)
    assert guided.item() == pytest.approx(1 + 2.5 * (3 - 1))


def test_scale_0_is_the_null_branch_and_scale_1_the_conditional_branch(velocities):
    v_cond, v_null = velocities[:2].float()
    assert torch.equal(classifier_free(v_cond, v_null, 1.0), v_cond)
    assert torch.equal(classifier_free(v_cond, v_null, torch.ones(4)), v_cond)
    torch.testing.assert_close(classifier_free(v_cond, v_null, 0.0), v_null)


def test_scale_applies_per_row(velocities):
    v_cond, v_null, _ = velocities
    scale = torch.tensor([0.0, 1.0, 2.0, 4.5], dtype=torch.float64)
    guided = classifier_free(v_cond, v_null, scale)
    for row, w in enumerate(scale.tolist()):
        torch.testing.assert_close(guided[row], v_null[row] + w * (v_cond[row] - v_null[row]))


def test_guidance_interval_is_closed():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert inside_interval(t, (0.25, 0.75)).tolist() == [False, True, True, True, False]
    assert inside_interval(t, (0.0, 1.0)).all()


def test_improved_mix_matches_hand_calculation():
    mixed = improved_mix(torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]]), omega=1.0, kappa=0.5)
    assert mixed.item() == pytest.approx(2 + 1.5 - 2.5)


def test_improved_mix_with_omega_1_and_kappa_0_is_the_teacher(velocities):
    torch.testing.assert_close(improved_mix(*velocities, omega=1.0, kappa=0.0), velocities[0])


def test_improved_mix_with_kappa_0_is_classifier_free_guidance(velocities):
    v_teacher, _, u_null = velocities
    torch.testing.assert_close(improved_mix(*velocities, omega=2.5, kappa=0.0), classifier_free(v_teacher, u_null, 2.5))


def test_improved_mix_of_equal_student_and_teacher_has_scale_omega_plus_kappa(velocities):
    v_teacher, _, u_null = velocities
    mixed = improved_mix(v_teacher, v_teacher, u_null, omega=1.0, kappa=0.5)
    torch.testing.assert_close(mixed, classifier_free(v_teacher, u_null, 1.5))


def test_improved_mix_of_equal_velocities_is_that_velocity(velocities):
    v = velocities[0]
    torch.testing.assert_close(improved_mix(v, v, v, omega=1.7, kappa=0.4), v)


def test_improved_mix_converges_to_the_effective_scale(velocities):
    v_teacher, u_cond, u_null = velocities
    for _ in range(80):  # each iteration multiplies the distance to the fixed point by kappa
        u_cond = improved_mix(v_teacher, u_cond, u_null, omega=1.0, kappa=0.5)
    torch.testing.assert_close(u_cond, classifier_free(v_teacher, u_null, 1.0 / (1 - 0.5)))


def test_improved_mix_weights_apply_per_row(velocities):
    omega = torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    kappa = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    mixed = improved_mix(*velocities, omega, kappa)
    for row in range(4):
        alone = improved_mix(*velocities[:, row : row + 1], omega[row].item(), kappa[row].item())
        torch.testing.assert_close(mixed[row : row + 1], alone)
