"""Captioned images from Hugging Face data sets: from the Hub, Parquet files or folders."""

import io
from pathlib import Path
from typing import Any, BinaryIO

from lightning_distill.data.image_files import ImageDecodeError, read_size
from lightning_distill.data.source_paths import find_files, split_patterns
from lightning_distill.data.tally import Tally
from lightning_distill.data.tar_captions import CAPTION_COLUMNS
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path


class HubImages:
    """Random access to the samples of one split.

    Image sizes are display sizes, after EXIF rotation. They come from the columns `height` and `width` if both exist. Otherwise
    image headers are read once, and the cache of `datasets` stores the sizes. Samples without a caption or with an unreadable
    header are skipped.

    Args:
        source: Hub id; directory of Parquet files or in the `imagefolder` layout; or patterns of `.parquet` files.
        split: Split of the data set.
        image_column: Column of the images.
        caption_column: Column of the captions; None takes the first of `CAPTION_COLUMNS` that the data set has.
        setting: Name of the setting with the data set, for error messages.

    Raises:
        ConfigurationError: If `datasets` is not installed, the data set cannot be loaded, it lacks a column, or it has no
            readable image with a caption.
    """

    def __init__(
        self, source: str | list[str], split: str, image_column: str, caption_column: str | None, setting: str
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigurationError(
                f'{setting} needs the package datasets; install it with pip install -c constraints.txt -e ".[data]"'
            ) from error
        name = source if isinstance(source, str) else ", ".join(source)
        patterns = split_patterns(source)
        is_parquet = bool(patterns) and all(pattern.endswith(".parquet") for pattern in patterns)
        if len(patterns) != 1 and not is_parquet:
            raise ConfigurationError(f"{setting} is {name!r}; give one Hub id or directory, or tar or .parquet files")
        files = [str(path) for path in find_files(source, setting)] if is_parquet else []
        try:
            if is_parquet:
                loaded = datasets.load_dataset("parquet", data_files=files, split=split)
            else:
                loaded = datasets.load_dataset(expand_path(patterns[0], setting), split=split)
        except (OSError, ValueError) as error:  # from the Hub and from local files
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"{setting} is {name!r}, whose split {split!r} cannot be loaded ({reason}); correct the name, or log in to the "
                "Hub"
            ) from error
        columns = loaded.column_names
        if caption_column is None:
            caption_column = next((column for column in CAPTION_COLUMNS if column in columns), CAPTION_COLUMNS[0])
        for column, option in ((image_column, "image_column"), (caption_column, "caption_column")):
            if column not in columns:
                raise ConfigurationError(
                    f"data.{option} is {column!r}, but {name!r} has the columns {', '.join(columns)}; choose one of these"
                )
        rows = loaded.cast_column(image_column, datasets.Image(decode=False))
        if {"height", "width"} <= set(rows.column_names):
            sizes = rows.select_columns(["height", "width"])
        else:
            sizes = rows.map(
                _read_size, fn_kwargs={"column": image_column}, remove_columns=rows.column_names, desc="Reading sizes"
            )
        heights, widths, captions = [each or 0 for each in sizes["height"]], sizes["width"][:], rows[caption_column][:]
        valid_rows = [i for i in range(len(rows)) if heights[i] > 0 and isinstance(captions[i], str)]
        self.skipped, self.remarks = Tally(), Tally()
        for i, (height, caption) in enumerate(zip(heights, captions, strict=True)):
            if not height > 0:
                self.skipped.add("images that are unreadable", f"row {i}")
            elif not isinstance(caption, str):
                self.skipped.add("images without a caption", f"row {i}")
        if not valid_rows:
            raise ConfigurationError(
                f"{setting} is {name!r}, which has no readable image with a caption; choose another data set"
            )
        self.name = name
        self.image_column = image_column
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

    def open_image(self, index: int) -> Path | BinaryIO:
        """Path or content of the image file of a sample."""
        return _open(self.rows[index][self.image_column])


def _open(image: dict[str, Any]) -> Path | BinaryIO:
    return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


def _read_size(row: dict[str, Any], column: str) -> dict[str, int]:
    if row[column] is None:
        return {"height": 0, "width": 0}
    try:
        height, width = read_size(_open(row[column]))
    except ImageDecodeError:
        return {"height": 0, "width": 0}
    return {"height": height, "width": width}
