"""Training, sampling and checkpoints that all methods share, tested on MeanFlow."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Objective
from tests.methods.gaussian_adapter import GAUSSIAN
from tests.methods.gaussian_runs import GaussianImages, empty_captions, loader, meanflow, trainer


def test_accumulated_gradients_equal_those_of_a_larger_batch(tmp_path: Any) -> None:
    biases = []
    for size, accumulate in ((8, 1), (4, 2)):
        module = meanflow(equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        module.student.bias.data += 0.5
        data = DataLoader(GaussianImages(), batch_size=size)
        trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(module, data)
        biases.append(module.student.bias.item())
    # At r = t the error of the student is its bias at every state, so the noise has no effect.
    assert biases[0] == pytest.approx(biases[1], abs=1e-6)
    assert biases[0] < 0.5


def test_gradients_are_clipped(tmp_path: Any) -> None:
    module = meanflow(equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    module.student.bias.data += 0.5
    trainer(tmp_path, max_steps=1, gradient_clip_val=0.01, limit_val_batches=0).fit(module, loader())
    assert module.student.bias.item() == pytest.approx(0.49, abs=1e-6)


def test_ema_follows_the_student_and_is_the_sampling_student(tmp_path: Any) -> None:
    module = meanflow(ema_decay=0.5, equal_fraction=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.student.bias.data += 0.5
    history = []
    module.on_before_zero_grad = lambda optimizer: history.append(module.student.bias.item())
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, loader())
    history.append(module.student.bias.item())
    average = history[1]  # the first update copies
    for value in history[2:]:
        average = 0.5 * average + 0.5 * value
    assert module.networks.sampling_student.bias.item() == pytest.approx(average, abs=1e-6)


def test_checkpoints_hold_the_student_and_its_ema_only(tmp_path: Any) -> None:
    module = meanflow("small", ema_decay=0.9)
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {".".join(name.split(".")[:2]) for name in names} == {"networks.student", "networks.ema"}


def test_checkpoint_of_other_settings_is_an_error(tmp_path: Any) -> None:
    module = meanflow("small")
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match="model settings"):
        trainer(tmp_path).fit(meanflow("small", ema_decay=0.9), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_sampled_images_depend_only_on_their_own_seed() -> None:
    module = meanflow()
    images = module.sample(["a", "b", "c"], nfe=2, seeds=[5, 6, 7])
    torch.testing.assert_close(images[1:2], module.sample(["b"], nfe=2, seeds=[6], batch_size=1))
    assert not torch.equal(images[0], images[1])


def test_one_step_sample_of_exact_student_is_the_teacher_flow_map() -> None:
    module = meanflow()
    noise = torch.randn(4, 3, 4, 4)
    x0 = module.evaluator.sample_latents(noise, empty_captions(4), 1, "student")
    torch.testing.assert_close(x0, GAUSSIAN.flow_map(noise, torch.ones(4), torch.zeros(4)))


def test_empty_prompt_is_encoded_once_outside_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    module, encoded = meanflow(), []
    monkeypatch.setattr(module.adapter, "encode_prompt", lambda prompts: encoded.append(prompts) or {"caption": torch.ones(1)})
    with torch.inference_mode():
        module.encoder.null_condition(2)
    null = module.encoder.null_condition(3)["caption"]
    assert encoded == [[""]]
    assert null.shape == (3,)
    assert not null.is_inference()
    module.encoder.trains_text_encoders = True
    module.encoder.null_condition(3)
    assert len(encoded) == 2


def test_networks_are_replaced_in_one_place() -> None:
    module = meanflow()
    student = torch.nn.Linear(1, 1)
    module.student = student
    assert module.student is module.networks.student is student
    assert "student" not in module._modules
    with pytest.raises(AttributeError, match="cannot be replaced"):
        module.adapter = module.adapter


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.ones(3), torch.ones(2, 1)])
def test_an_objective_of_another_shape_is_an_error(loss: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"^Objective has a loss of shape \(.*\) and t of shape \(2,\); give the loss"):
        Objective(loss, torch.ones(2))


@pytest.mark.parametrize("auxiliary", [False, True])
def test_an_objective_of_another_type_is_an_error(monkeypatch: pytest.MonkeyPatch, auxiliary: bool) -> None:
    module = meanflow()

    def steps() -> Any:
        return torch.ones(2)
        yield

    monkeypatch.setattr(module, "objective", lambda x0, condition: steps() if auxiliary else torch.ones(2))
    with pytest.raises(ConfigurationError, match=r"^MeanFlow\.objective returns a Tensor; return Objective\(loss, t\), with"):
        module.evaluate_objective(torch.ones(2, 3, 4, 4), {})
