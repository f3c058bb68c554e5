"""Samples in the members of a tar file: which image and which caption belong together.

The members of a sample share a name and differ in what follows its last dot: `photo v1.0.jpg` and `photo v1.0.txt`. The layout
of webdataset also allows fields, as in `0001.image.jpg` and `0001.caption.txt`. Nothing is extracted, unpickled or executed,
and links are not followed.
"""

import posixpath
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lightning_distill.data.caption_tables import replace_lone_surrogates, without_blanks
from lightning_distill.data.image_files import IMAGE_SUFFIXES, ImageDecodeError, read_size
from lightning_distill.data.tally import Tally
from lightning_distill.data.tar_captions import (
    CAPTION_SUFFIXES,
    MAX_CAPTION_BYTES,
    CaptionError,
    read_json,
    read_text,
)

MAX_IMAGE_BYTES = 1 << 28
"""Size of the largest image file that is read."""


@dataclass(frozen=True, slots=True)
class TarSample:
    """Location, caption and size of an image in a shard.

    Attributes:
        name: File name of the image within the shard.
        offset: Byte offset of the image within the shard.
        size: File size of the image in bytes.
        captions: Captions of the image, at least one.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """

    name: str
    offset: int
    size: int
    captions: tuple[str, ...]
    height: int
    width: int


@dataclass(frozen=True)
class TarIndex:
    """Contents of a shard.

    Attributes:
        samples: Samples in the order of their images.
        skipped: Counts of the files that are in no sample, by reason.
        remarks: Counts of what is worth a warning but is not skipped.
    """

    samples: list[TarSample]
    skipped: Tally = field(default_factory=Tally)
    remarks: Tally = field(default_factory=Tally)


class TarMembers:
    """Collects the members of a shard and pairs images with captions.

    Args:
        caption_column: Key of the captions in `.json` files, which then win over `.txt` files. None prefers `.txt` files, and
            tries the usual keys in `.json` files.
    """

    def __init__(self, caption_column: str | None) -> None:
        self.caption_column = caption_column
        self.skipped = Tally()
        self.remarks = Tally()
        self.images: dict[str, TarSample] = {}  # by the name up to its last dot, as all that follow; without captions
        self.captions: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)  # by suffix
        self.problems: dict[str, str] = {}  # captions that cannot be used
        self.ambiguous: dict[str, str] = {}  # captions under one of several keys
        self.names: dict[str, str] = {}  # first caption file of a name
        self.skipped_images: set[str] = set()
        self.others: dict[str, str] = {}

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Read a member: the header of an image, the text of a caption."""
        key, suffix = posixpath.splitext(member.name)
        suffix = suffix.lower()
        if suffix not in IMAGE_SUFFIXES and suffix not in CAPTION_SUFFIXES:
            self.others.setdefault(key, member.name)
        elif key.startswith("/") or ".." in key.split("/"):
            self.skipped.add("files whose names lead out of the tar file", member.name)
        elif suffix in IMAGE_SUFFIXES:
            self._add_image(archive, member, key)
        else:
            self._add_caption(archive, member, key, suffix)

    def _add_image(self, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> None:
        earlier = self.images.get(key)
        if earlier is not None and earlier.name != member.name:
            self.skipped.add("further images with the name of another", member.name)
            return
        problem = _problem(member, MAX_IMAGE_BYTES)
        if problem is None:
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            try:
                self.images[key] = TarSample(member.name, member.offset_data, member.size, (), *read_size(content))
            except ImageDecodeError:
                problem = "unreadable"
            else:
                if earlier is not None:
                    self._count_replaced(member.name)
        if problem is not None:
            self.skipped.add(f"images that are {problem}", member.name)
            self.skipped_images.add(key)

    def _add_caption(self, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str, suffix: str) -> None:
        self.names.setdefault(key, member.name)
        if self.captions[key].pop(suffix, None):
            self._count_replaced(member.name)
        problem = _problem(member, MAX_CAPTION_BYTES)
        if problem is not None:
            self.problems[key] = f"images whose caption is {problem}"
            return
        content = archive.extractfile(member)
        assert content is not None  # it is a file
        captions: tuple[str, ...]
        found: Sequence[str] = ()
        try:
            if suffix == ".txt":
                captions = (read_text(content.read()),)
            else:
                captions, found = read_json(content.read(), self.caption_column)
        except CaptionError as error:
            self.problems[key] = str(error)
            return
        self.captions[key][suffix] = captions
        if len(found) > 1:
            self.ambiguous[key] = (
                f"captions under {found[0]!r} in a .json file that has {' and '.join(map(repr, found[1:]))} too"
            )

    def _count_replaced(self, name: str) -> None:
        """Count a member in whose place a later one of the same name is used, as unpacking the tar file would."""
        self.skipped.add("files that a later one of the same name replaces", name)

    def index(self) -> TarIndex:
        """Samples of the shard, and counts of the files that are in none."""
        caption_keys = {key: key for key in self.images if key in self.names}
        images = [key for key in self.images if key not in caption_keys]
        captions = [key for key in self.names if key not in caption_keys]
        caption_keys |= {**_pair_fields(images, captions), **_pair_normal_forms(images, captions)}
        samples = []
        for key, image in self.images.items():
            if texts := self._captions(caption_keys.get(key), image.name):
                samples.append(replace(image, captions=texts))
        used = {*caption_keys.values(), *self.skipped_images}
        for key, name in self.names.items():
            if key not in used:
                self.skipped.add(
                    "captions without an image", f"{name} beside {self.others[key]}" if key in self.others else name
                )
        return TarIndex(samples, self.skipped, self.remarks)

    def _captions(self, key: str | None, image: str) -> tuple[str, ...]:
        """Captions under a key. Without one, counts the image."""
        if key is None:
            self.skipped.add("images without a caption", image)
            return ()
        order = (".txt", ".json") if self.caption_column is None else (".json", ".txt")
        captions = self.captions.get(key, {})
        found = next((suffix for suffix in order if suffix in captions), None)
        if found is None:
            self.skipped.add(self.problems[key], image)
            return ()
        if found == ".txt" and self.caption_column is not None:
            self.remarks.add(f"captions from .txt files, without {self.caption_column!r} in a .json file", image)
        if found == ".json" and key in self.ambiguous:
            self.remarks.add(self.ambiguous[key], image)
        kept = without_blanks(captions[found])
        if kept != captions[found]:
            self.remarks.add("images of whose captions some are blank, which are skipped", image)
        replaced = tuple(map(replace_lone_surrogates, kept))
        if replaced != kept:
            self.remarks.add("captions with half a character (a lone surrogate), replaced by U+FFFD", image)
        return replaced


def _problem(member: tarfile.TarInfo, limit: int) -> str | None:
    """What makes a member unusable, or None."""
    if not member.isreg() or member.issparse():
        return "of a special type (link, device or sparse)"
    return f"larger than {limit >> 20} MiB" if member.size > limit else None


def _pair_normal_forms(images: Iterable[str], captions: Iterable[str]) -> dict[str, str]:
    """Pair names that are equal in the composed normal form, as macOS and Linux write accents differently.

    Args:
        images: Names of images without a caption, up to the last dot.
        captions: Names of captions without an image, up to the last dot.

    Returns:
        Name of the caption by name of the image, where one of each has a normal form.
    """
    groups: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for kind, names in enumerate((images, captions)):
        for name in names:
            groups[unicodedata.normalize("NFC", name)][kind].append(name)
    return {group[0][0]: group[1][0] for group in groups.values() if len(group[0]) == len(group[1]) == 1}


def _pair_fields(images: Iterable[str], captions: Iterable[str]) -> dict[str, str]:
    """Pair names that are equal up to the first dot, such as `0001.image` and `0001.caption`.

    The words that follow are fields if they recur: a pair of them in one sample only may as well be two names with dots.

    Args:
        images: Names of images without a caption, up to the last dot.
        captions: Names of captions without an image, up to the last dot.

    Returns:
        Name of the caption by name of the image.
    """
    groups: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for kind, names in enumerate((images, captions)):
        for name in names:
            groups[_split_field(name)[0]][kind].append(name)
    pairs = [(group[0][0], group[1][0]) for group in groups.values() if len(group[0]) == len(group[1]) == 1]
    fields = Counter((_split_field(image)[1], _split_field(caption)[1]) for image, caption in pairs)
    recurring = {pair for pair, count in fields.items() if count > 1 and all(word.isidentifier() for word in pair if word)}
    return {image: caption for image, caption in pairs if (_split_field(image)[1], _split_field(caption)[1]) in recurring}


def _split_field(name: str) -> tuple[str, str]:
    """Name up to the first dot of its last part, and the rest."""
    folder, slash, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    return folder + slash + key, rest
