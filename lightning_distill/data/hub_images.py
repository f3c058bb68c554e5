"""Captioned images from Hugging Face data sets: from the Hub, Parquet files or folders."""

import glob
import io
from pathlib import Path
from typing import Any

from lightning_distill.data.image_files import ImageDecodeError, read_size
from lightning_distill.errors import ConfigurationError


class HubImages:
    """Random access to the samples of one split.

    Image sizes are display sizes, after EXIF rotation. They come from the columns `height` and `width` if both exist. Otherwise
    image headers are read once, and the cache of `datasets` stores the sizes. Samples without a caption or with an unreadable
    header are skipped.

    Args:
        name: Hub id; directory of Parquet files or in the `imagefolder` layout; or `.parquet` path, with `*` for many files.
        split: Split of the data set.
        image_column: Column of the images.
        caption_column: Column of the captions.
        setting: Name of the setting with the data set, for error messages.

    Raises:
        ConfigurationError: If `datasets` is not installed, the data set cannot be loaded, it lacks a column, or it has no
            readable image with a caption.
    """

    def __init__(self, name: str, split: str, image_column: str, caption_column: str, setting: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigurationError(
                f'{setting} needs the package datasets; install it with pip install -c constraints.txt -e ".[data]"'
            ) from error
        self.name = name
        self.image_column = image_column
        self.caption_column = caption_column
        try:
            if name.endswith(".parquet"):
                loaded = datasets.load_dataset("parquet", data_files=sorted(glob.glob(name)), split=split)
            else:
                loaded = datasets.load_dataset(name, split=split)
        except (OSError, ValueError) as error:  # from the Hub and from local files
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"{setting} is {name!r}, whose split {split!r} cannot be loaded ({reason}); correct the name, or log in to the "
                "Hub"
            ) from error
        for column, option in ((image_column, "image_column"), (caption_column, "caption_column")):
            if column not in loaded.column_names:
                raise ConfigurationError(
                    f"data.{option} is {column!r}, but {name!r} has the columns {', '.join(loaded.column_names)}; choose one "
                    "of these"
                )
        rows = loaded.cast_column(image_column, datasets.Image(decode=False))
        if {"height", "width"} <= set(rows.column_names):
            sizes = rows.select_columns(["height", "width"])
        else:
            sizes = rows.map(
                _read_size, fn_kwargs={"column": image_column}, remove_columns=rows.column_names, desc="Reading sizes"
            )
        heights, widths, captions = sizes["height"][:], sizes["width"][:], rows[caption_column][:]
        valid_rows = [i for i in range(len(rows)) if heights[i] > 0 and isinstance(captions[i], str)]
        self.unreadable = sum(height <= 0 for height in heights)
        if not valid_rows:
            raise ConfigurationError(
                f"{setting} is {name!r}, which has no readable image with a caption; choose another data set"
            )
        self.rows = rows.select(valid_rows)
        self.row_numbers = valid_rows
        self.captions = [captions[i] for i in valid_rows]
        self.sizes = [(heights[i], widths[i]) for i in valid_rows]

    def __len__(self) -> int:
        return len(self.captions)

    def location(self, index: int) -> str:
        """Location of a sample, for messages."""
        return f"row {self.row_numbers[index]} of {self.name}"

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        return self.captions[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.sizes[index]

    def open_image(self, index: int) -> io.BytesIO:
        """Encoded image file of a sample."""
        return _open(self.rows[index][self.image_column])


def _open(image: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())


def _read_size(row: dict[str, Any], column: str) -> dict[str, int]:
    try:
        height, width = read_size(_open(row[column]))
    except ImageDecodeError:
        return {"height": 0, "width": 0}
    return {"height": height, "width": width}
