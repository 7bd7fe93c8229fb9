"""Looking at our batches on a server, and cancelling them; nothing here asks a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hf_relabel.errors import SourceError
from hf_relabel.judges.batch_api import ENDED, BatchApi, BatchView
from hf_relabel.judges.batch_state import BatchFolder
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint

__all__ = ["cancel_batches", "list_batches", "n_under_way"]


async def list_batches(endpoint: Endpoint, cache: Path) -> list[tuple[BatchView, bool]]:
    """Return the batches that hf_relabel made, newest first, and whether this cache's runs did.

    Args:
        endpoint: Whose Batch API.
        cache: The cache's folder.
    """
    folder_id = _folder_id(cache)
    async with _api(endpoint) as api:
        views = await api.list_ours()
    return [(view, view.metadata.get("cache") == folder_id) for view in views]


async def cancel_batches(
    endpoint: Endpoint, cache: Path, batch_id: str | None = None
) -> list[BatchView]:
    """Cancel one batch, or all of this cache that have not ended; their requests are not asked again.

    Replies that came before stay there, and the next run collects them.

    Raises:
        SourceError: No batch of ours has this id.
    """
    folder, folder_id = BatchFolder(cache), _folder_id(cache)
    async with _api(endpoint) as api:
        ours = await api.list_ours()
        if batch_id is None:
            chosen = [view for view in ours if view.metadata.get("cache") == folder_id]
        else:
            chosen = [view for view in ours if view.id == batch_id]
            if not chosen:
                raise SourceError(
                    f"expected the id of a batch that hf_relabel made, found {batch_id!r}. "
                    "`hf-relabel batches list` shows them."
                )
        cancelled = []
        for view in chosen:
            if view.status not in ENDED:
                # First, so that a run that waits for it cannot ask its requests again.
                folder.note_cancelled(view.manifest)
                cancelled.append(await api.cancel(view.id))
    return cancelled


def n_under_way(cache: Path) -> int:
    """Return how many batches of a cache wait on a server, as far as its folder knows."""
    return sum(manifest.end is None for manifest in BatchFolder(cache).manifests())


def _folder_id(cache: Path) -> str:
    path = BatchFolder(cache).directory / "id"
    return path.read_text("utf-8").strip() if path.exists() else ""


@asynccontextmanager
async def _api(endpoint: Endpoint) -> AsyncIterator[BatchApi]:
    api = BatchApi(endpoint.connect(None), retry=RetryRule())
    try:
        yield api
    finally:
        await api.close()
