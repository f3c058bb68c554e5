"""Tables for tests, in the formats of their endings."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a table in the format of its ending."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], dialect="excel" if ending == ".csv" else "excel-tab")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if ending == ".jsonl" else f"[{', '.join(lines)}]")
    return path
