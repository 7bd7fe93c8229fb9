"""Formats: dataset rows in, dataset rows out; the only code that knows column names.

`resolve` finds the format of a dataset's columns, `Format.read` turns a batch into `Row` values,
`Format.write` turns them back with one `Edit` each, and `convert` rewrites a whole dataset.

    format = resolve(dataset.column_names)
    rows = format.read(batch)
    written = format.write(batch, rows, edits, seed=0)

Modules, each importing only from those before it: rows (values), checks (errors of one row), base
(what every format shares), lists, groups, labeled, refill, fixed (the formats and what they need),
columns (detection), convert; digests (one hash of a row) and arrow (batches in place), which load
where `map` hands over Arrow.
"""

from __future__ import annotations

from hf_relabel.formats.base import Format
from hf_relabel.formats.columns import FORMATS, detect, get_format, resolve
from hf_relabel.formats.convert import convert
from hf_relabel.formats.rows import (
    NORMALIZATION,
    Batch,
    Edit,
    Passage,
    Row,
    Written,
    content_hash,
    normalize,
)
from hf_relabel.formats.scan import iter_rows

__all__ = [
    "FORMATS",
    "NORMALIZATION",
    "Batch",
    "Edit",
    "Format",
    "Passage",
    "Row",
    "Written",
    "content_hash",
    "convert",
    "detect",
    "get_format",
    "iter_rows",
    "normalize",
    "resolve",
]
