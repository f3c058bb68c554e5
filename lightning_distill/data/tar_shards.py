"""Random access to captioned images in tar files of the webdataset layout.

The tar headers are read once, and an index stores the byte offset of each image. A sample order is therefore a permutation of
indices. A resumed run continues with the exact next sample, for any number of workers.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.data.caption_tables import CAPTION_COLUMNS
from lightning_distill.data.image_files import IMAGE_SUFFIXES, UnreadableImageError
from lightning_distill.data.tally import Tally
from lightning_distill.data.tar_index import file_state, load_index, scan, store_index
from lightning_distill.data.tar_members import TarSample
from lightning_distill.errors import ConfigurationError, StorageError

MAX_OPEN_SHARDS = 128
"""Maximum number of open shards per process."""


class TarShards:
    """Samples of several shards, concatenated.

    Args:
        paths: Paths of the shards, in order.
        caption_column: Key of the captions in `.json` files, which then win over `.txt` files. None prefers `.txt` files, and
            tries the usual keys in `.json` files.

    Raises:
        ConfigurationError: If a shard is damaged or not an uncompressed tar file, or there are no samples.
    """

    def __init__(self, paths: Sequence[Path], caption_column: str | None = None) -> None:
        self.paths = list(paths)
        self.samples: list[tuple[int, TarSample]] = []
        self.skipped = Tally()
        self.remarks = Tally()
        self.states = [file_state(path.stat()) for path in self.paths]
        unwritable: list[tuple[Path, Exception]] = []
        for number, path in enumerate(self.paths):
            index = load_index(path, caption_column)
            if index is None:
                index = scan(path, caption_column)
                try:
                    store_index(path, caption_column, index)
                except (OSError, StorageError) as error:
                    unwritable.append((path, error))
            self.samples += [(number, sample) for sample in index.samples]
            self.skipped.update(index.skipped, str(path))
            self.remarks.update(index.remarks, str(path))
        if unwritable:
            path, reason = unwritable[0]
            rank_zero_warn(
                f"The index of {len(unwritable)} tar files cannot be stored next to them (first {path}: {reason}); each start "
                "reads their headers again"
            )
        if not self.samples:
            keys = CAPTION_COLUMNS if caption_column is None else (caption_column,)
            skipped = f"; skipped {self.skipped}" if self.skipped else ""
            raise ConfigurationError(
                f"the tar files from {self.paths[0]} on have no image ({', '.join(IMAGE_SUFFIXES)}) with a caption (.txt, or "
                f".json with the key {' or '.join(map(repr, keys))}){skipped}; correct the path, or set data.caption_column"
            )
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files; every worker process opens files itself."""
        return {**self.__dict__, "_files": OrderedDict()}

    def location(self, index: int) -> str:
        """Location of a sample, for messages."""
        number, sample = self.samples[index]
        return f"{sample.name} in {self.paths[number]}"

    def captions(self, index: int) -> Sequence[str]:
        """Captions of a sample, at least one."""
        return self.samples[index][1].captions

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        sample = self.samples[index][1]
        return sample.height, sample.width

    def open_image(self, index: int) -> io.BytesIO:
        """Encoded image file of a sample.

        Raises:
            OSError: If the shard cannot be read.
            UnreadableImageError: If the shard is not the one whose headers were read, so that images would get other captions.
        """
        number, sample = self.samples[index]
        if number not in self._files:
            self._files[number] = self._open(number)
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return io.BytesIO(os.pread(self._files[number].fileno(), sample.size, sample.offset))

    def _open(self, number: int) -> BinaryIO:
        file = self.paths[number].open("rb")
        if file_state(os.fstat(file.fileno())) != self.states[number]:
            file.close()
            raise UnreadableImageError(
                f"{self.paths[number]} changed after its headers were read; start again to read them anew"
            )
        return file
