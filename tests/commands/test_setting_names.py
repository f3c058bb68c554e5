import pytest

from lightning_distill.commands.setting_names import with_full_names

SETTINGS = {
    "data": {"class_path": "Prompts"},
    "out": "latents",
    "model": {
        "class_path": "DMD2",
        "init_args": {
            "adapter": {"class_path": "DiffusersAdapter", "init_args": {"pretrained": "student.time_embedding"}},
            "guidance": {"scale": -1.0, "kind": "embedded"},
            "student": {"lora": {"rank": 4}},
            "critic": {"student": {"lora": {"rank": 0}}},
        },
    },
}


@pytest.mark.parametrize(
    ("message", "full"),
    [
        ("guidance.scale is -1.0; set it to 0 or more", "model.guidance.scale is -1.0; set it to 0 or more"),
        ("lora.rank is 4; set lora to null", "model.student.lora.rank is 4; set lora to null"),
        ("lora.rank is 0; set lora to null", "model.critic.student.lora.rank is 0; set lora to null"),
        ("guidance.kind is x, see guidance.scale.", "model.guidance.kind is x, see model.guidance.scale."),
        ("adapter is Own, which has no guidance.scale", "model.adapter is Own, which has no model.guidance.scale"),
        ("data is Prompts, which has no images", "data is Prompts, which has no images"),
        ("out is 'x'; set it", "out is 'x'; set it"),
        ("model.guidance.scale is -1.0", "model.guidance.scale is -1.0"),
        ("file 'guidance.scale' or a/guidance.scale is damaged", "file 'guidance.scale' or a/guidance.scale is damaged"),
        ("nothing.scale is 3", "nothing.scale is 3"),
    ],
)
def test_names_of_the_model_are_complete(message, full):
    assert with_full_names(message, SETTINGS) == full


def test_without_settings():
    assert with_full_names("guidance.scale is -1.0", {}) == "guidance.scale is -1.0"
