"""The Hub: a run's folder built into a dataset with a card, checked, pushed, and loaded back.

    build (files, no network) → check (offline) → push (one commit) → verify (fresh cache)

Modules, each importing only from those before it: settings (what is asked for), runs (a run's
folder), batches (rows as arrays), configs (the shapes people train with), shards (Parquet out),
secrets, licences, croissant, facts (what the card says), build, check, retries, merge, push, verify,
publishing (all of it, in one call).
"""

from __future__ import annotations

from hf_relabel.hub.publishing import Published, publish

__all__ = ["Published", "publish"]
