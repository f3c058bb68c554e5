"""Settings of a model that uses a checkpoint without training, against those of its training."""

import copy
import warnings
from typing import Any

import pytest

from lightning_distill.commands.resume_report import SETTINGS
from lightning_distill.commands.trained_settings import card_fields, check_trained_settings
from lightning_distill.errors import ConfigurationError

MODEL: dict[str, Any] = {
    "adapter": {
        "class_path": "DiffusersAdapter",
        "init_args": {"pretrained": "hub/teacher", "revision": "v1", "torch_dtype": "float32", "attention_backend": None},
    },
    "student": {"time_embedding": "smooth", "frequency_bound": 6.2832, "lora": None, "pretrained": None, "max_drift": 0.1},
    "guidance": {"kind": "two_branch", "scale": 3.0},
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
    "validation": {"nfe": [1, 4], "height": 32, "width": 16},
    "loss": {"class_path": "PowerLoss", "init_args": {"gamma": 1.0}},
}


def settings(**changes: Any) -> dict[str, Any]:
    """Settings with other values by their dotted names, `__` for each dot."""
    model = copy.deepcopy(MODEL)
    method = changes.pop("method", "MeanFlow")
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = model
        for parent in parents:
            inner = inner[parent]
        inner.get("init_args", inner)[last] = value
    return {"model": {"class_path": method, "init_args": model}, "data": {"class_path": "Data"}, "trainer": {"max_steps": 3}}


CHECKPOINT = {SETTINGS: settings()}
LORA = {"rank": 2, "alpha": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "IMM"}, "model is IMM, and ckpt_path 'a.ckpt' was trained with MeanFlow; set it to MeanFlow"),
        (
            {"student__time_embedding": "original"},
            "model.student.time_embedding is original, .* trained with smooth; set it to",
        ),
        ({"student__frequency_bound": 9.0}, "model.student.frequency_bound is 9.0, .* trained with 6.2832; set it to 6.2832"),
        ({"student__policy_points": 2}, "model.student.policy_points is 2, .* trained with unset; remove it"),
        ({"student__lora": LORA}, "model.student.lora is {rank: 2, alpha: null}, .* trained with null; set it to null"),
        ({"adapter__pretrained": "hub/other"}, "model.adapter.pretrained is hub/other, .* trained with hub/teacher; set it to"),
        ({"adapter__revision": "v2"}, "model.adapter.revision is v2, .* trained with v1; set it to v1"),
        ({"adapter__lora": ["style.safetensors"]}, r"model.adapter.lora is \['style.safetensors'\], .* trained with unset"),
        ({"guidance__kind": "improved"}, "model.guidance.kind is improved, .* trained with two_branch"),
    ],
)
def test_other_networks_are_an_error_that_names_both_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        check_trained_settings(settings(**changes), CHECKPOINT, "a.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance__scale": 7.0}, r"model.guidance.scale 7.0 \(checkpoint: 3.0\)$"),
        ({"loss__gamma": 0.5}, r"model.loss.gamma 0.5 \(checkpoint: 1.0\)$"),
        ({"adapter__torch_dtype": "bfloat16"}, r"model.adapter.torch_dtype bfloat16 \(checkpoint: float32\)$"),
        (
            {"adapter__pretrained": "/models/teacher", "adapter__revision": None},
            r"model.adapter.pretrained /models/teacher \(checkpoint: hub/teacher\), "
            r"model.adapter.revision null \(checkpoint: v1\)$",
        ),
    ],
)
def test_other_settings_of_the_model_are_a_warning(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=f"checkpoint a.ckpt was trained with other settings of the model: {message}"):
        check_trained_settings(settings(**changes), CHECKPOINT, "a.ckpt")


@pytest.mark.parametrize(
    "new",
    [
        settings(),
        settings(student__max_drift=9.0, validation__nfe=[8], adapter__attention_backend="native"),
        settings(optimizer={"class_path": "SGD", "init_args": {"lr": 1.0}}),
        {**settings(), "data": {"class_path": "Other"}, "trainer": {"max_steps": 5}},
    ],
)
def test_settings_of_training_data_and_validation_are_not_compared(new: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trained_settings(new, CHECKPOINT, "a.ckpt")


STYLES = [{"path": "/training/style.safetensors", "weight": 0.5}, "/training/light.safetensors"]


def test_lora_of_the_same_name_in_another_place_is_a_warning() -> None:
    trained = {SETTINGS: settings(adapter__lora=STYLES)}
    moved = [{"path": "/here/style.safetensors", "weight": 0.5}, "/here/light.safetensors"]
    with pytest.warns(UserWarning, match=r"model\.adapter\.lora"):
        check_trained_settings(settings(adapter__lora=moved), trained, "a.ckpt")
    for other in (
        [{**STYLES[0], "weight": 1.0}, STYLES[1]],  # type: ignore[dict-item]
        ["/here/other.safetensors", STYLES[1]],
        [STYLES[0]],
    ):
        with pytest.raises(ConfigurationError, match=r"model\.adapter\.lora is"):
            check_trained_settings(settings(adapter__lora=other), trained, "a.ckpt")


def test_a_checkpoint_without_settings_is_not_compared() -> None:
    check_trained_settings(settings(method="IMM"), {}, "a.ckpt")
    assert card_fields({}) == {}


def test_the_card_states_the_settings_of_the_training() -> None:
    assert card_fields(CHECKPOINT) == {"guidance_scale": 3.0, "nfe": [1, 4], "height": 32, "width": 16}
