import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.commands.main import main
from lightning_distill.data import Prompts
from lightning_distill.errors import ConfigurationError

TEXTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*TEXTS, "", "  ", TEXTS[0], ""]))
    return path


def ready(file: Path, stage: str = "fit", **settings: Any) -> Prompts:
    data = Prompts(str(file), **{"batch_size": 4, "validation_samples": 3} | settings)
    data.setup(stage)
    return data


def texts(loader: Any) -> list[str]:
    return [prompt for batch in loader for prompt in batch["prompt"]]


def test_every_prompt_once_and_none_on_both_sides(file: Path) -> None:
    data = ready(file, batch_size=1)
    train, validation = texts(data.train_dataloader()), texts(data.val_dataloader())
    assert len(validation) == 3
    assert sorted(train + validation) == sorted(TEXTS)
    assert train != sorted(train)
    for batch in ready(file).train_dataloader():
        assert batch.keys() == {"prompt", "index"}
        assert batch["index"].dtype == torch.int64
        assert len(batch["prompt"]) == 4


def test_validation_depends_on_the_texts_alone(file: Path, tmp_path: Path) -> None:
    chosen = texts(ready(file).val_dataloader())
    (tmp_path / "other.txt").write_text("\n".join(reversed(TEXTS)))
    assert texts(ready(tmp_path / "other.txt", seed=7).val_dataloader()) == chosen[::-1]


def test_lines_of_json_and_a_validation_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{text}\nsecond line", "id": 1}) for text in TEXTS))
    data = ready(path, validation_file=str(file))
    assert sorted(texts(data.train_dataloader())) == sorted(f"{text}\nsecond line" for text in TEXTS)
    assert texts(data.val_dataloader()) == texts(data.predict_dataloader()) == TEXTS


def test_a_loader_goes_on_where_its_state_was_saved(file: Path) -> None:
    loader = ready(file).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = [batch["prompt"] for batch in iterator]
    again = ready(file).train_dataloader()
    again.load_state_dict(state)
    assert [batch["prompt"] for batch in again] == rest
    assert len(rest) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "data.file is .* which is not a file"),
        ("empty.txt", b"\n\n", "is empty"),
        ("latin.txt", b"caf\xe9\n", "line 1 of .* cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 of .* cannot be read"),
        ("keyless.jsonl", b'{"caption": "a"}', 'no string under "text"'),
        ("few.txt", b"a\nb\nc\nd\ne\n", "2 training samples do not hold a batch"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        ready(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.validation_samples is 0"):
        Prompts("prompts.txt", validation_samples=0)


def test_the_embedded_teacher_is_distilled_from_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    colors, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
    Path("prompts.txt").write_text("\n".join(f"a {color} {shape}" for color in colors for shape in shapes))
    Path("prompts.yaml").write_text(
        """base: shapes_student.yaml
model:
  class_path: MeanFlow
  init_args: {solution: bootstrapped, trajectory_fraction: 1.0, validation: {nfe: [1]}}
data:
  class_path: Prompts
  init_args: {file: prompts.txt, validation_samples: 4, batch_size: 4}
trainer: {max_steps: 2, accelerator: cpu, devices: 1, val_check_interval: 2, log_every_n_steps: 1}
"""
    )
    main(["fit", "--config", "prompts.yaml"])
