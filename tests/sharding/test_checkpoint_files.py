import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from lightning_distill.digests import MANIFEST, write_manifest
from lightning_distill.errors import ConfigurationError, DamagedFileError
from lightning_distill.sharding.checkpoint_files import (
    METADATA,
    REST,
    check_content,
    check_records,
    check_undamaged,
    local_path,
    newest_checkpoint,
    read_checkpoint,
    recover,
)
from lightning_distill.sharding.shard_reader import ShardReader, load_shards

VERSION = {"pytorch-lightning_version": "2.6"}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save(path, step=1, **more):
    state = {"weight": torch.arange(6.0), "bias": torch.ones(3)}
    torch.save({"global_step": step, "state_dict": state, **VERSION, **more}, path)
    return path


def save_sharded(directory, step=1, extra=None):
    state = {"weights": {"weight": torch.arange(6.0)}, "optimizer": {"lr": 0.5, "betas": (0.9, 0.99)}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state | (extra or {}), storage_writer=FileSystemWriter(directory))
    torch.save({"global_step": step, **VERSION}, directory / REST)
    write_manifest(directory)
    return directory


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path = save(tmp_path / "a.ckpt")
    content = path.read_bytes()
    found, data = 0, []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            data += range(start, start + info.file_size)
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        file = io.BytesIO(flipped)
        try:
            check_records(file, path)
            file.seek(0)
            read = torch.load(file)
        except (ConfigurationError, RuntimeError):  # torch raises the latter where it reads a header otherwise
            found += 1
            continue
        assert position not in data
        assert read["state_dict"]["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found > len(data) / 7 * 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"x" * 100, "not in the format of torch.save"), (b"PK\x03\x04" + b"x" * 100, "is damaged")],
)
def test_file_of_another_format_is_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_checkpoint(path)


def test_compressed_record_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(DamagedFileError, match=r"archive/data.pkl"):
        check_undamaged(tmp_path / "a.ckpt")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, prefix):
    save(tmp_path / "a.ckpt", more=Payload(tmp_path / "ran"))
    with pytest.raises(ConfigurationError, match=r"a.ckpt' cannot be read: it holds more than tensors") as found:
        read_checkpoint(f"{prefix}{tmp_path / 'a.ckpt'}")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "ran").exists()


def test_code_on_remote_storage_is_not_run(tmp_path):
    import fsspec

    save(tmp_path / "a.ckpt", more=Payload(tmp_path / "ran"))
    with fsspec.open("memory://a.ckpt", "wb") as file:
        file.write((tmp_path / "a.ckpt").read_bytes())
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_checkpoint("memory://a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_local_paths():
    assert local_path("file:///a%20b/c.ckpt") == Path("/a b/c.ckpt")
    assert local_path("s3://bucket/c.ckpt") is None
    assert local_path("c.ckpt") == Path("c.ckpt")


def test_checkpoint_without_optimizer_states_cannot_be_resumed(tmp_path):
    content = read_checkpoint(save(tmp_path / "a.ckpt"))
    check_content(content, "a.ckpt", resumes=False)
    with pytest.raises(ConfigurationError, match=r"a.ckpt' has no optimizer_states"):
        check_content(content, "a.ckpt", resumes=True)


def test_checkpoint_with_empty_optimizer_states_cannot_be_resumed():
    content = {"global_step": 2, "state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {"fit_loop": {}}}
    check_content(content, "a.ckpt", resumes=False)
    check_content({**content, "global_step": 0}, "a.ckpt", resumes=True)
    with pytest.raises(ConfigurationError, match=r"a.ckpt' has no state of an optimizer in its optimizer_states; .* full"):
        check_content(content, "a.ckpt", resumes=True)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ({"state_dict": {"weight": torch.tensor([torch.nan])}}, "weight"),
        ({"optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([torch.inf])}}}]}, "optimizer_states.0.state.0.exp_avg"),
    ],
)
def test_state_that_is_not_finite_is_refused(tmp_path, part, value):
    with pytest.raises(DamagedFileError, match=f"'{value}' is not finite"):
        check_content({"state_dict": {}, **part}, "a.ckpt", resumes=False)


def test_sharded_directory_is_read(tmp_path):
    path = save_sharded(tmp_path / "a.ckpt")
    check_undamaged(path)
    state = {"weights": {"weight": torch.zeros(6)}, "optimizer": {"lr": 0.0, "betas": (0, 0)}}
    load_shards(state, path, no_dist=True)
    assert state["weights"]["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert state["optimizer"] == {"lr": 0.5, "betas": (0.9, 0.99)}


@pytest.mark.parametrize("name", [METADATA, REST, "__0_0.distcp"])
def test_flipped_bit_in_a_sharded_directory_is_found(tmp_path, name):
    path = save_sharded(tmp_path / "a.ckpt")
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    (path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"a.ckpt' is damaged: {name} is not what was written"):
        check_undamaged(path)


@pytest.mark.parametrize("name", [METADATA, REST, MANIFEST])
def test_directory_without_a_file_of_the_format_is_no_checkpoint(tmp_path, name):
    path = save_sharded(tmp_path / "a.ckpt")
    (path / name).unlink()
    with pytest.raises(ConfigurationError, match=f"it has no {name}"):
        read_checkpoint(path)


def test_code_in_an_index_of_shards_is_not_run(tmp_path):
    path = save_sharded(tmp_path / "a.ckpt")
    (path / METADATA).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ConfigurationError, match=r"its .metadata is damaged or was not written by fit .it refers to .*open"):
        ShardReader(path).read_metadata()
    with pytest.raises(ConfigurationError, match=r"its .metadata is damaged"):
        load_shards({"weights": {"weight": torch.zeros(6)}}, path, no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_values_of_shards_is_not_run(tmp_path):
    path = save_sharded(tmp_path / "a.ckpt", extra={"more": Payload(tmp_path / "ran")})
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match=r"a.ckpt' cannot be read"):
        load_shards({"more": 0}, path, no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_index_that_names_files_elsewhere_is_refused(tmp_path):
    path = save_sharded(tmp_path / "a.ckpt")
    index = pickle.loads((path / METADATA).read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../b.distcp"
    (path / METADATA).write_bytes(pickle.dumps(index))
    with pytest.raises(ConfigurationError, match=r"names the file '../b.distcp' elsewhere"):
        ShardReader(path).read_metadata()


def test_newest_checkpoint_is_the_linked_one_then_the_last_step(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path / "resumed.ckpt", 5)
    save(tmp_path / "late.ckpt", 9)
    save_sharded(tmp_path / "sharded.ckpt", 7)
    (tmp_path / "last.ckpt").symlink_to("resumed.ckpt")
    assert newest_checkpoint(tmp_path).name == "resumed.ckpt"
    (tmp_path / "resumed.ckpt").unlink()
    assert newest_checkpoint(tmp_path).name == "late.ckpt"
    (tmp_path / "late.ckpt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"late.ckpt' is not a checkpoint of fit .* it is skipped"):
        assert newest_checkpoint(tmp_path).name == "sharded.ckpt"
    (tmp_path / "sharded.ckpt" / REST).write_bytes(b"damaged")
    with pytest.raises(ConfigurationError, match=r"late.ckpt|sharded.ckpt"):
        newest_checkpoint(tmp_path)


def test_replaced_directory_is_recovered(tmp_path):
    (tmp_path / ".a.ckpt.replaced").mkdir()
    recover(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").is_dir()
