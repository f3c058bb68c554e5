"""`export`: the student of a checkpoint equals the export of the run."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from lightning_distill.commands.main import main
from lightning_distill.digests import MANIFEST
from lightning_distill.export.mark import ExportMark
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from tests.tiny import PROMPTS, save_tiny_pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of two steps, with config, checkpoint and export."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = {
        "base": "shapes_student.yaml",
        "model": {
            "class_path": "MeanFlow",
            "init_args": {
                "adapter": {"init_args": {"pretrained": save_tiny_pipeline(folder / "teacher")}},
                "student": {"max_drift": 10.0},
                "ema_decay": 0.5,
                "lr_scheduler": None,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "metric": None,
                "validation": {"nfe": [1], "average_velocity": False},
            },
        },
        "data": {"init_args": {"size": 8, "batch_size": 4, "prompts_per_category": 1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "AtomicCheckpoint", "init_args": {"dirpath": str(folder), "every_n_train_steps": 2}},
                {"class_path": "ExportPipeline", "init_args": {"directory": str(folder / "student"), "formats": ["any_step"]}},
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "run.yaml")])
    return folder


def export(run: Path, target: Path, *further: str) -> dict[str, torch.Tensor]:
    arguments = ["--config", str(run / "run.yaml"), "--ckpt_path", str(run / "last.ckpt"), "--directory", str(target)]
    main(["export", *arguments, *(() if "--format" in further else ("--format", "any_step")), *further])
    return {name: value for file in (target / "transformer").glob("*.safetensors") for name, value in load_file(file).items()}


def test_export_equals_that_of_the_run(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "student")
    names = {path.relative_to(run / "student") for path in (run / "student").rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "student") for path in (tmp_path / "student").rglob("*") if path.is_file()}
    differing = [name for name in names if (run / "student" / name).read_bytes() != (tmp_path / "student" / name).read_bytes()]
    # Only the card of the run has the training time. A tokenizer saves its last padding.
    assert {name for name in differing if "tokenizer" not in str(name)} == {Path("README.md"), Path(MANIFEST)}


def test_export_from_a_printed_config(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(run / "run.yaml"), "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert {"ckpt_path", "weights_only"} < yaml.safe_load((tmp_path / "run.yaml").read_text()).keys()
    (tmp_path / "last.ckpt").symlink_to(run / "last.ckpt")
    printed, written = export(tmp_path, tmp_path / "printed"), export(run, tmp_path / "written")
    assert all(printed[name].equal(written[name]) for name in printed.keys() | written.keys())


def test_large_students_are_split_into_several_files(run: Path, tmp_path: Path) -> None:
    expected = load_file(next((run / "student" / "transformer").glob("*.safetensors")))
    found = export(run, tmp_path / "student", "--max_shard_size", "200KB")
    files = list((tmp_path / "student" / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 300_000
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    images = [
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)(
            PROMPTS[0], num_inference_steps=2, height=32, width=32, output_type="pt", generator=torch.Generator().manual_seed(0)
        ).images
        for folder in (run / "student", tmp_path / "student")
    ]
    assert torch.equal(*images)


def test_the_newest_checkpoint_is_found(run: Path, tmp_path: Path) -> None:
    newest = export(run, tmp_path / "newest", "--ckpt_path", "last")
    named = load_file(next((run / "student" / "transformer").glob("*.safetensors")))
    assert newest.keys() == named.keys()
    assert all(newest[name].equal(named[name]) for name in named)


def test_the_card_states_what_the_checkpoint_was_trained_with(run: Path, tmp_path: Path) -> None:
    other = ["--model.guidance.scale=7", "--model.validation.nfe=[3]", "--model.validation.height=64"]
    with pytest.warns(UserWarning, match=r"other settings of the model: model.guidance.scale 7.0 \(checkpoint: "):
        export(run, tmp_path / "student", *other)
    trained, exported = ((folder / "README.md").read_text().splitlines() for folder in (run / "student", tmp_path / "student"))
    assert exported == [line for line in trained if not line.startswith("| Training time")]


def test_flattened_weights_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    """As ZeRO-3 stores them."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {name: value.flatten() for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "flat.ckpt")
    flat = export(run, tmp_path / "flat", "--ckpt_path", str(tmp_path / "flat.ckpt"), "--format", "stock")
    shaped = export(run, tmp_path / "shaped", "--format", "stock")
    assert flat.keys() == shaped.keys()
    assert all(flat[name].equal(shaped[name]) for name in shaped)


def test_last_weights_in_place_of_the_ema(run: Path, tmp_path: Path) -> None:
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    found = export(run, tmp_path / "student", "--weights", "last")
    assert all(torch.equal(value, state[f"networks.student.{name}"]) for name, value in found.items())
    assert not all(torch.equal(value, state[f"networks.ema.module.{name}"]) for name, value in found.items())


def test_weights_that_are_not_finite_are_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.startswith("networks.ema.module."))
    checkpoint["state_dict"][name].view(-1)[0] = torch.inf
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(SystemExit) as end:
        export(run, tmp_path / "student", "--ckpt_path", str(tmp_path / "broken.ckpt"))
    assert end.value.code == 2
    assert f"the weight {name!r} of ckpt_path" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path 'nowhere.ckpt' does not exist"),
        (["--ckpt_path", "nowhere/a.ckpt", "--max_shard_size", "5XB"], "max_shard_size is '5XB'; set it to a number above 0"),
        (["--max_shard_size", "0GB"], "max_shard_size is '0GB'; set it to a number above 0"),
        (["--model.student.time_embedding=original"], "model.student.time_embedding is original, and ckpt_path "),
        (["--model=ConsistencyDistillation"], "model is lightning_distill.methods.ConsistencyDistillation, and ckpt_path "),
        (
            ["--ckpt_path=last", "--trainer.callbacks=AtomicCheckpoint", "--trainer.default_root_dir=."],
            "ckpt_path is 'last', but there is no last checkpoint in ",
        ),
        (["--directory", "."], "directory is '.', which has files that are not an earlier export"),
    ],
)
def test_impossible_exports_exit_with_one_message(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit) as end:
        export(run, tmp_path / "student", *arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "Traceback" not in error


def test_several_formats_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    """The stock pipelines are computed from weights that are read file by file."""
    export(run, tmp_path / "exports", "--format", "stock", "any_step", "lora", "--nfe", "1", "2", "--rank", "4")
    folders = {path.name for path in (tmp_path / "exports").iterdir() if path.is_dir()}
    assert folders == {"any_step", "stock_1", "stock_2", "lora_1", "lora_2"}
    settings = {"height": 32, "width": 32, "output_type": "pt"}
    student = DiffusionPipeline.from_pretrained(tmp_path / "exports" / "any_step", trust_remote_code=True)
    for nfe in (1, 2):
        mark = ExportMark.read(tmp_path / "exports" / f"stock_{nfe}")
        assert mark.nfe == (nfe,)
        stock = DiffusionPipeline.from_pretrained(tmp_path / "exports" / f"stock_{nfe}")
        images = [
            pipeline(
                prompt=PROMPTS,
                num_inference_steps=nfe,
                generator=[torch.Generator().manual_seed(i) for i in range(3)],
                **settings,
                **each,
            ).images
            for pipeline, each in ((student, {}), (stock, mark.arguments))
        ]
        torch.testing.assert_close(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "stok"], "format has 'stok'; did you mean stock?"),
        (["--format", "lora"], "format has lora, but the student has no LoRA; set rank to extract one"),
        (["--format", "stock", "--nfe", "0"], r"nfe is \[0\]; give different numbers of steps of at least 1"),
        (["--format", "stock", "--rank", "4"], "rank is 4, but no LoRA is extracted"),
        (["--format", "any_step", "--nfe", "3"], r"nfe is \[3\], but the only export, any_step, is for any number of steps"),
        (["--format", "stock", "--format=stok"], "format has 'stok'; did you mean stock?"),
        (["--format", "kohya", "--rank", "4"], "format kohya is not possible for FluxTransformer2DModel"),
    ],
)
def test_formats_are_checked_before_anything_loads(
    run: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DiffusersAdapter, "load", lambda self: pytest.fail("components are loaded"))
    with pytest.raises(SystemExit):
        export(run, tmp_path / "student", *options)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "student").exists()


def test_the_card_has_the_report_of_the_same_weights(run: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to(run / "last.ckpt")
    (tmp_path / "run.yaml").write_text((run / "run.yaml").read_text())
    (tmp_path / "images.png").write_bytes(b"png")
    summary = {"student": {"1": 0.25, "2": float("nan")}, "minutes": 3.0, "steps": 2}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    export(tmp_path, tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| 1 | 0.25 |" in card
    assert "| Training time | 3.0 minutes |" in card
    assert "nan" not in card
    assert (tmp_path / "student" / "images.png").read_bytes() == b"png"
    export(tmp_path, tmp_path / "student", "--weights", "last")
    assert not (tmp_path / "student" / "images.png").exists()


def test_the_export_is_pushed_after_a_check(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[tuple[Path, str, bool]] = []

    def push(directory: Path, name: str, public: bool) -> str:
        assert (directory / "README.md").is_file()
        pushed.append((directory, name, public))
        return "https://hub/owner/name"

    monkeypatch.setattr("lightning_distill.commands.export.push", push)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    export(run, tmp_path / "student", "--push_to_hub", "owner/name", "--public", "true")
    assert pushed == [(tmp_path / "student", "owner/name", True)]
    for arguments, message in (
        (["--push_to_hub", "name"], "push_to_hub is 'name' (the name has no owner); set it to owner/name"),
        (["--public", "true"], "public is true, but push_to_hub is not set"),
    ):
        with pytest.raises(SystemExit) as end:
            export(run, tmp_path / "other", *arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
