"""Weights of a checkpoint against those of the configuration."""

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.checkpoint_state import check_loaded_weights, check_lora_rank

STUDENT = "networks.student.block.weight"
LORA = "networks.student.to_q.lora_A.default.weight"


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {{"student": STUDENT, "lora": LORA, "critic": "critic.weight"}[name]: torch.zeros(s) for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"student": (2, 3), "critic": (1,), "lora": (4, 3)},
            f"ckpt_path 'a' has the weight '{LORA}' that this configuration lacks",
        ),
        ({"critic": (1,)}, f"ckpt_path 'a' lacks the weight '{STUDENT}' of this configuration"),
        (
            {"student": (2, 4)},
            rf"the weight '{STUDENT}' has shape \(2, 4\) in ckpt_path 'a', and \(2, 3\) in this configuration",
        ),
    ],
)
def test_weights_of_another_network_are_an_error(found, message):
    with pytest.raises(ConfigurationError, match=message):
        check_loaded_weights(weights(**found), weights(student=(2, 3)), ("networks.student.",), "ckpt_path 'a'")


def test_weights_of_networks_that_are_not_configured_are_left_over():
    check_loaded_weights(weights(student=(2, 3), critic=(1,)), weights(student=(2, 3)), ("networks.student.",), "a")


def test_another_lora_rank_is_named():
    expected = r"student\.lora\.rank is 8, and a has LoRA weights of rank 4; set it to 4"
    with pytest.raises(ConfigurationError, match=expected):
        check_loaded_weights(weights(lora=(4, 3)), weights(lora=(8, 3)), ("networks.student.",), "a")
    with pytest.raises(ConfigurationError, match=expected):
        check_lora_rank({STUDENT: (2, 3), LORA: (4, 3)}, 8, "a")
    check_lora_rank({STUDENT: (2, 3), LORA: (8, 3)}, 8, "a")
