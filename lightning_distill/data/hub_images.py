"""Captioned images from Hugging Face data sets: from the Hub, Parquet files or folders."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.data.caption_tables import CAPTION_COLUMNS, FILE_NAME, as_captions, without_blanks
from lightning_distill.data.image_files import ImageDecodeError, read_size
from lightning_distill.data.source_paths import find_files, split_patterns
from lightning_distill.data.tally import Tally
from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path

if TYPE_CHECKING:
    import datasets

_INTEGERS = ("int16", "int32", "int64", "uint16", "uint32", "uint64")


class HubImages:
    """Random access to the samples of one split.

    Image sizes are display sizes, after EXIF rotation. They come from the columns `height` and `width` if both have integers.
    Otherwise image headers are read once, and the cache of `datasets` stores the sizes. Samples without a caption, with a blank
    one or with an unreadable header are skipped and counted.

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
        self.name = source if isinstance(source, str) else ", ".join(source)
        self.image_column = image_column
        loaded = _load(source, split, setting, self.name)
        columns = loaded.column_names
        if caption_column is None:
            found = [column for column in CAPTION_COLUMNS if column in columns] or ["caption"]
            caption_column = found[0]
            if len(found) > 1:
                rank_zero_warn(
                    f"{setting} has the columns {', '.join(found)}: captions are read from {found[0]!r}; set "
                    "data.caption_column to choose"
                )
        for column, option in ((image_column, "image_column"), (caption_column, "caption_column")):
            if column not in columns:
                others = [name for name in columns if name not in (image_column, FILE_NAME)]
                raise ConfigurationError(
                    f"data.{option} is {column!r}, but {self.name!r} has the columns {', '.join(others)}; choose one of these"
                )
        rows = _without_decoding(loaded, image_column)
        sizes, captions = _sizes(rows, image_column), rows[caption_column][:]
        self.skipped, self.remarks = Tally(), Tally()
        self.row_numbers: list[int] = []
        self._captions: list[tuple[str, ...]] = []
        for i, ((height, width), caption) in enumerate(zip(sizes, captions, strict=True)):
            if min(height, width) < 1:
                self.skipped.add("images that are unreadable", f"row {i}")
            elif not (texts := as_captions(caption)):
                self.skipped.add("images without a caption", f"row {i}")
            elif not (kept := without_blanks(texts)):
                self.skipped.add("images whose caption is blank", f"row {i}")
            else:
                if kept != texts:
                    self.remarks.add("images of whose captions some are blank, which are skipped", f"row {i}")
                self.row_numbers.append(i)
                self._captions.append(kept)
        if not self.row_numbers:
            raise ConfigurationError(
                f"{setting} is {self.name!r}, which has no readable image with a caption under {caption_column!r}, a text or "
                f"a list of texts ({self.skipped or 'it has no rows'}); choose another data set, or set data.caption_column"
            )
        self.rows = rows.select(self.row_numbers)
        self.sizes = [sizes[i] for i in self.row_numbers]

    def __len__(self) -> int:
        return len(self.sizes)

    def location(self, index: int) -> str:
        """Location of a sample, for messages."""
        return f"row {self.row_numbers[index]} of {self.name}"

    def captions(self, index: int) -> Sequence[str]:
        """Captions of a sample, at least one."""
        return self._captions[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.sizes[index]

    def open_image(self, index: int) -> Path | BinaryIO:
        """Path or content of the image file of a sample."""
        return _open(self.rows[index][self.image_column])


def _load(source: str | list[str], split: str, setting: str, name: str) -> "datasets.Dataset":
    """Load the data set of a source.

    Raises:
        ConfigurationError: If `datasets` is not installed, or the data set cannot be loaded.
    """
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise ConfigurationError(
            f'{setting} needs the package datasets; install it with pip install -c constraints.txt -e ".[data]"'
        ) from error
    patterns = split_patterns(source)
    is_parquet = bool(patterns) and all(pattern.endswith(".parquet") for pattern in patterns)
    if len(patterns) != 1 and not is_parquet:
        raise ConfigurationError(f"{setting} is {name!r}; give one Hub id or directory, or tar or .parquet files")
    files = [str(path) for path in find_files(source, setting)] if is_parquet else []
    try:
        if is_parquet:
            return datasets.load_dataset("parquet", data_files=files, split=split)
        return datasets.load_dataset(expand_path(patterns[0], setting), split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:500]
        raise ConfigurationError(
            f"{setting} is {name!r}, whose split {split!r} cannot be loaded ({reason}); correct the name, replace damaged "
            "files, or log in to the Hub"
        ) from error


def _without_decoding(loaded: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """Data set whose column has encoded image files or their paths."""
    import datasets
    import pyarrow

    try:
        return loaded.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigurationError(
            f"data.image_column is {column!r}, whose values are no images but {loaded.features[column]}; choose another one of "
            f"{', '.join(loaded.column_names)}"
        ) from error


def _sizes(rows: "datasets.Dataset", column: str) -> list[tuple[int, int]]:
    """Heights and widths of the images in pixels; below 1 for images whose headers cannot be read."""
    if any(getattr(rows.features.get(name), "dtype", "") not in _INTEGERS for name in ("height", "width")):
        rows = rows.map(_read_size, fn_kwargs={"column": column}, remove_columns=rows.column_names, desc="Reading sizes")
    return [(int(height or 0), int(width or 0)) for height, width in zip(rows["height"][:], rows["width"][:], strict=True)]


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
