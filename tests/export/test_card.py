"""Contents of model cards."""

from pathlib import Path

from lightning_distill.export.card import ModelCard, render_card
from lightning_distill.methods.guidance import Guidance
from lightning_distill.teachers.student_options import StudentOptions
from tests.callbacks.distillation import PixelDistillation


def test_card_has_settings_figures_and_code() -> None:
    card = ModelCard(
        "MeanFlow", "black-forest-labs/FLUX.1-dev", (1, 2, 4), 512, 768, 4.5, 1000, 12.34, {"val/accuracy": 0.98765}, "A note."
    )
    text = render_card(card, "student", {"guidance_scale": 4.5})
    for part in (
        "library_name: diffusers",
        "base_model: black-forest-labs/FLUX.1-dev",
        "generates images in 1, 2 or 4 steps",
        "| Method | MeanFlow |",
        "| Teacher | black-forest-labs/FLUX.1-dev |",
        "| Image size | 512 x 768 pixels |",
        "| Training steps | 1000 |",
        "| Training time | 12.3 minutes |",
        "| val/accuracy | 0.9877 |",
        "trust_remote_code=True",
        "guidance_scale=4.5",
        "A note.",
        "license applies",
    ):
        assert part in text


def test_card_of_a_method_has_its_settings() -> None:
    module = PixelDistillation(
        nfe=(2, 8), guidance=Guidance(scale=3.0), student=StudentOptions(pretrained="shapes-student"), with_metric=False
    )
    expected = ModelCard(
        "PixelDistillation",
        "PixelAdapter",
        (2, 8),
        32,
        32,
        3.0,
        7,
        1.5,
        {"val/loss": 0.5},
        "A note.",
        "float32",
        "shapes-student",
    )
    assert ModelCard.from_method(module, steps=7, minutes=1.5, figures={"val/loss": 0.5}, notes="A note.") == expected
    assert ModelCard.from_method(module, steps=7).minutes is None


def test_card_has_the_last_part_of_a_local_path(tmp_path: Path) -> None:
    (tmp_path / "my-teacher").mkdir()
    text = render_card(ModelCard("MeanFlow", str(tmp_path / "my-teacher"), (4,), 32, 32), "student", {})
    assert str(tmp_path) not in text
    assert "| Teacher | my-teacher |" in text
    assert "base_model" not in text
