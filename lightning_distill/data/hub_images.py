"""Captioned pictures in data sets of Hugging Face: of the hub, Parquet files or folders."""

import glob
import io
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_distill.data.image_folder import UNREADABLE, upright_size
from lightning_distill.errors import ConfigurationError


class HubImages:
    """Samples of one split, read at random.

    Sizes, of pictures as they are shown, are taken from the columns `height` and `width` where there are such, or read once
    from the pictures' headers and kept in the cache of `datasets`. A sample without a caption, or whose header cannot be read,
    is passed over.

    Args:
        name: A hub id; a directory, of Parquet files or in the layout of `imagefolder`; or a `.parquet` path, `*` for many.
        split: Of the data set.
        image_column: Column of the pictures.
        caption_column: Column of the captions.
        setting: Name of the setting that gives the data set, for errors.

    Raises:
        ConfigurationError: If `datasets` is not installed, there is no such data set, or it lacks a column.
    """

    def __init__(self, name: str, split: str, image_column: str, caption_column: str, setting: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigurationError(
                f'{setting} needs the package datasets; install it by pip install -c constraints.txt -e ".[data]"'
            ) from error
        self.name = name
        self.image_column = image_column
        self.caption_column = caption_column
        try:
            if name.endswith(".parquet"):
                found = datasets.load_dataset("parquet", data_files=sorted(glob.glob(name)), split=split)
            else:
                found = datasets.load_dataset(name, split=split)
        except (OSError, ValueError) as error:  # of the hub and of what lies on the disk
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"{setting} is {name!r}, of which no split {split!r} can be loaded ({reason}); correct its name, or log in"
            ) from error
        for column, which in ((image_column, "image_column"), (caption_column, "caption_column")):
            if column not in found.column_names:
                raise ConfigurationError(
                    f"data.{which} is {column!r}, and {name!r} has {', '.join(found.column_names)}; choose one of these"
                )
        rows = found.cast_column(image_column, datasets.Image(decode=False))
        if {"height", "width"} <= set(rows.column_names):
            sizes = rows.select_columns(["height", "width"])
        else:
            sizes = rows.map(
                _read_size, fn_kwargs={"column": image_column}, remove_columns=rows.column_names, desc="Reading sizes"
            )
        heights, widths, captions = sizes["height"][:], sizes["width"][:], rows[caption_column][:]
        kept = [i for i in range(len(rows)) if heights[i] > 0 and isinstance(captions[i], str)]
        self.unreadable = sum(height <= 0 for height in heights)
        if not kept:
            raise ConfigurationError(f"{setting} is {name!r}, which holds no readable picture with a caption; give another")
        self.rows = rows.select(kept)
        self.places = kept
        self.captions = [captions[i] for i in kept]
        self.sizes = [(heights[i], widths[i]) for i in kept]

    def __len__(self) -> int:
        return len(self.captions)

    def place(self, index: int) -> str:
        """Where a sample is, for messages."""
        return f"row {self.places[index]} of {self.name}"

    def caption(self, index: int) -> str:
        """What a picture shows."""
        return self.captions[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.sizes[index]

    def picture(self, index: int) -> io.BytesIO:
        """The bytes of a picture."""
        return _bytes(self.rows[index][self.image_column])


def _bytes(image: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())


def _read_size(row: dict[str, Any], column: str) -> dict[str, int]:
    try:
        height, width = upright_size(Image.open(_bytes(row[column])))
    except UNREADABLE:
        return {"height": 0, "width": 0}
    return {"height": height, "width": width}
