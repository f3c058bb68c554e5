import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.commands.main import main
from lightning_distill.data import Prompts
from lightning_distill.data.prompts import read_prompts
from lightning_distill.errors import ConfigurationError
from tests.data.tables import write_table

TEXTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*TEXTS, "", "  ", TEXTS[0], ""]))
    return path


def set_up(file: Path, stage: str = "fit", **settings: Any) -> Prompts:
    data = Prompts(str(file), **{"batch_size": 4, "validation_samples": 3} | settings)
    data.setup(stage)
    return data


def texts(loader: Any) -> list[str]:
    return [prompt for batch in loader for prompt in batch["prompt"]]


def test_every_prompt_is_in_exactly_one_split(file: Path) -> None:
    data = set_up(file, batch_size=1)
    train, validation = texts(data.train_dataloader()), texts(data.val_dataloader())
    assert len(validation) == 3
    assert sorted(train + validation) == sorted(TEXTS)
    assert train != sorted(train)
    for batch in set_up(file).train_dataloader():
        assert batch.keys() == {"prompt", "index"}
        assert batch["index"].dtype == torch.int64
        assert len(batch["prompt"]) == 4


def test_validation_split_depends_only_on_the_prompts(file: Path, tmp_path: Path) -> None:
    expected = texts(set_up(file).val_dataloader())
    (tmp_path / "other.txt").write_text("\n".join(reversed(TEXTS)))
    assert texts(set_up(tmp_path / "other.txt", seed=7).val_dataloader()) == expected[::-1]


def test_jsonl_file_and_validation_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{text}\nsecond line", "id": 1}) for text in TEXTS))
    data = set_up(path, validation_file=str(file))
    assert sorted(texts(data.train_dataloader())) == sorted(f"{text}\nsecond line" for text in TEXTS)
    assert texts(data.val_dataloader()) == texts(data.predict_dataloader()) == TEXTS


def test_loader_resumes_from_its_state(file: Path) -> None:
    loader = set_up(file).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = [batch["prompt"] for batch in iterator]
    resumed = set_up(file).train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["prompt"] for batch in resumed] == rest
    assert len(rest) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "data.file is .* which is not a file"),
        ("empty.txt", b"\n\n", "is empty"),
        ("latin.txt", b"caf\xe9\n", "line 1 of .* is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 of .* is not JSON"),
        (
            "keyless.jsonl",
            b'{"words": "a"}',
            'no string under "text", "caption" or "prompt"; set data.caption_column',
        ),
        ("list.yaml", b"- a\n- b", r"which has the ending '\.yaml'; convert or rename it to one of \.txt, \.jsonl, \.json, "),
        ("prompts", b"a\nb", "which has the ending ''; convert or rename it"),
        ("few_validation.txt", b"a\nb\nc\n", r"data\.validation_samples is 3, but data\.file .* has only 3 prompts"),
        ("few.txt", b"a\nb\nc\nd\ne\n", "2 training samples are too few for a batch"),
    ],
)
def test_invalid_files_raise_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        set_up(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSON", "prompts.Csv", "prompts.tsv", "prompts.parquet"])
def test_tables(name: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / name, [{"id": number, "prompt": text} for number, text in enumerate(TEXTS)])
    assert read_prompts(path, "data.file") == TEXTS
    assert read_prompts(path, "data.file", "prompt") == TEXTS


def test_line_ends_of_any_system_and_blank_prompts(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "old_mac.txt").write_bytes(b"one\rtwo\r\rthree")
    assert read_prompts(tmp_path / "old_mac.txt", "data.file") == ["one", "two", "three"]
    assert not recwarn.list  # blank lines of a text file are no prompts
    (tmp_path / "old_mac.csv").write_bytes(b"text,id\rone,1\r,2\rthree,3")
    with pytest.warns(UserWarning, match=r"^skips 1 blank captions of .*old_mac\.csv, first in line 3$"):
        assert read_prompts(tmp_path / "old_mac.csv", "data.file") == ["one", "three"]


@pytest.mark.parametrize("content", ['["a", "b", ""]', '[{"text": "a"}, {"text": ["b", "a"]}]', '"a"\n"b"\n'])
def test_lists_in_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)
    assert read_prompts(tmp_path / "prompts.json", "data.file") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"), [("prompts.txt", "which has no columns"), ("prompts.json", "entry 1 of .* is not a JSON object")]
)
def test_column_of_prompts_without_columns_raises(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('["a", "b"]')
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(tmp_path / name, "data.file", "words")


def test_home_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert len(texts(set_up(Path("~/prompts.txt"), validation_file="$HOME/prompts.txt").val_dataloader())) == 20


def test_few_prompts_suffice_to_validate(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a\nb\n")
    assert texts(set_up(tmp_path / "few.txt", "validate").val_dataloader()) == ["a", "b"]


def test_invalid_settings_raise() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.validation_samples is 0"):
        Prompts("prompts.txt", validation_samples=0)


def test_embedded_teacher_distillation_from_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    colors, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
    Path("prompts.txt").write_text("\n".join(f"a {color} {shape}" for color in colors for shape in shapes))
    Path("prompts.yaml").write_text(
        """base: shapes_student.yaml
model:
  class_path: MeanFlow
  init_args: {solution: bootstrapped, trajectory_fraction: 1.0, validation: {nfe: [1], teacher_nfe: 2, solver_steps: 2}}
data:
  class_path: Prompts
  init_args: {file: prompts.txt, validation_samples: 4, batch_size: 4}
trainer: {max_steps: 2, accelerator: cpu, devices: 1, val_check_interval: 2, log_every_n_steps: 1}
"""
    )
    main(["fit", "--config", "prompts.yaml"])
