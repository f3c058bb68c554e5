"""Training from precomputed data equals training from the source images."""

import io
import json
import sys
import tarfile
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from lightning_distill.commands.main import main
from lightning_distill.data import Precomputed
from lightning_distill.data.shapes import prompts
from lightning_distill.teachers import DiffusersAdapter
from tests.precomputing import write_config
from tests.tiny import load_adapter, save_tiny_pipeline


def train(folder: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """Run `run.yaml` and return the state dict of its checkpoint."""
    run = next(run for i in count() if not (run := folder / f"run-{i}").exists())
    main(["fit", "--config=run.yaml", f"--trainer.default_root_dir={run}", *arguments])
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    return state


def write_captioned_shard(path: Path, count: int) -> None:
    """Write noise images of two sizes, with captions from the vocabulary of the embedded teacher."""
    captions = [prompt.text for pool in prompts(held_out=False).values() for prompt in pool[:3]]
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            height, width = (32, 32) if i % 3 else (24, 44)
            pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            for name, content in ((f"{i}.png", file.getvalue()), (f"{i}.txt", captions[i % len(captions)].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("ShapesData", "32-true"), ("ImageText", "32-true"), pytest.param("ShapesData", "bf16-mixed", marks=pytest.mark.slow)],
)
def test_training_equals_training_from_images(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {}
    if kind == "ImageText":
        write_captioned_shard(tmp_path / "images.tar", 30)
        names = {"source": "images.tar", "validation_source": "images.tar", "validation_samples": 6}
        sizes = {"height": 32, "width": 32, "multiple": 8, "batch_size": 6, "num_workers": 0}
        settings["data"] = {"class_path": "ImageText", "init_args": names | sizes}
    write_config(tmp_path, **settings)
    options = [f"--trainer.precision={precision}"]
    main(["precompute", "--config=run.yaml", "--out=encoded", "--shard_size=8", *options])
    expected = train(tmp_path, *options)
    from_files = ["--data=Precomputed", "--data.directory=encoded", "--data.batch_size=6", "--data.num_workers=0"]
    with monkeypatch.context() as patched:
        for method in ("encode_prompt", "encode_images"):
            patched.setattr(DiffusersAdapter, method, lambda *args: pytest.fail("encoded again"))
        found = train(tmp_path, *options, *from_files)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    start = load_adapter("shapes-teacher").load_teacher().state_dict()
    moved = [name for name in start if not torch.equal(found[f"networks.student.{name}"], start[name])]
    assert len(moved) > len(start) / 2, "training changed few weights, so the comparison above proves nothing"


def test_bfloat16_halves_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(
        tmp_path, data={"class_path": "ShapesData", "init_args": {"size": 48, "batch_size": 6, "prompts_per_category": 1}}
    )
    for dtype in ("float32", "bfloat16"):
        main(["precompute", "--config=run.yaml", f"--out={dtype}", f"--dtype={dtype}", "--shard_size=48"])
    full, half = (Path(dtype, "train-00000.safetensors").stat().st_size for dtype in ("float32", "bfloat16"))
    assert half < 0.55 * full
    data = Precomputed("bfloat16", batch_size=6, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    original = Precomputed("float32", batch_size=6, num_workers=0)
    original.setup("fit")
    expected = next(iter(original.train_dataloader()))
    for one, other in (
        (batch["latents"], expected["latents"]),
        *zip(batch["condition"].values(), expected["condition"].values(), strict=True),
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.to(torch.bfloat16).float())


def test_validation_images_and_export_equal_training_from_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    report = {"class_path": "FinalReport", "init_args": {"diversity_prompts": 1, "diversity_seeds": 2, "columns": 2}}
    export = {"class_path": "ExportPipeline"}
    config = yaml.safe_load(write_config(tmp_path).read_text())
    config["trainer"] |= {"max_steps": 2, "limit_val_batches": None, "val_check_interval": 1, "callbacks": [report, export]}
    config["model"]["init_args"]["metric"] = {"class_path": "PromptAccuracy"}
    config["model"]["init_args"]["adapter"] = {
        "class_path": "DiffusersAdapter",
        "init_args": {"pretrained": save_tiny_pipeline(tmp_path / "teacher")},
    }
    config["model"]["init_args"]["student"] = {"max_drift": 10.0}
    write_config(tmp_path, model=config["model"], trainer=config["trainer"])
    main(["precompute", "--config=run.yaml", "--out=encoded"])
    quiet = "--trainer.enable_checkpointing=false"
    main(["fit", "--config=run.yaml", f"--trainer.default_root_dir={tmp_path / 'images'}", quiet])
    from_files = ["--data=Precomputed", "--data.directory=encoded", "--data.batch_size=6", "--data.num_workers=0"]
    main(["fit", "--config=run.yaml", f"--trainer.default_root_dir={tmp_path / 'files'}", quiet, *from_files])
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in ("images", "files")]
    assert all(summary.pop("minutes") >= 0 for summary in summaries)
    assert summaries[0] == summaries[1]
    assert Path("images/images.png").read_bytes() == Path("files/images.png").read_bytes()
    written, expected = (
        {path.relative_to(name): path.read_bytes() for path in Path(name).rglob("*.safetensors")}
        for name in ("files/student", "images/student")
    )
    assert written == expected
    exports = {path.parts[0] for path in written}
    assert "any_step" in exports
    assert len(exports) == 2
    assert {path.parts[1] for path in written} == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    pipeline = DiffusionPipeline.from_pretrained("files/student/any_step", trust_remote_code=True)
    assert len(pipeline("a red circle", num_inference_steps=1, height=32, width=32).images) == 1
