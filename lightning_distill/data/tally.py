"""Counts of what a data source skips or changes, with an example of each, for one line of the log."""

from collections.abc import Mapping
from typing import Any


class Tally:
    """Counts by description; the first example of each is kept.

    Args:
        entries: Descriptions, each with its count and its first example.
    """

    def __init__(self, entries: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.entries: dict[str, tuple[int, str]] = dict(entries or {})

    def add(self, description: str, example: str, count: int = 1) -> None:
        """Add `count` files with a description; the first example of a description is kept."""
        earlier, first = self.entries.get(description, (0, example))
        self.entries[description] = earlier + count, first

    def update(self, other: "Tally", place: str) -> None:
        """Add the counts of another tally, whose examples are in `place`, or are the place if empty."""
        for description, (count, example) in other.entries.items():
            self.add(description, f"{example} in {place}" if example else place, count)

    def to_json(self) -> dict[str, Any]:
        """Entries as JSON values."""
        return {description: [count, example] for description, (count, example) in self.entries.items()}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> "Tally":
        """Tally of the entries that `to_json` returned."""
        return cls({description: (int(count), str(example)) for description, (count, example) in entries.items()})

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return "; ".join(f"{description}: {count} (first {example})" for description, (count, example) in self.entries.items())
