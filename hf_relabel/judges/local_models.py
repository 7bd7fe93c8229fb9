"""What judges with a model of their own share: its fingerprint, its extra, and silence.

torch and transformers load where they are used.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_relabel.errors import MissingExtraError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

__all__ = ["digest_of_folder", "digest_of_weights", "no_progress_bar", "require_local"]


def require_local(package: str, purpose: str) -> None:
    """Raise when a package of the extra `local` is not installed.

    Raises:
        MissingExtraError: With the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError.of(package, "local", purpose)


def digest_of_folder(folder: Path) -> str:
    """Hash a model's files, weights too: two trainings of one architecture differ in nothing else.

    90 MB take 0.1 s. Where the folder lies and what it is called change no answer.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        if path.suffix == ".md" or any(part.startswith(".") for part in relative.parts):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{relative.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def digest_of_weights(model: SentenceTransformer | CrossEncoder) -> str:
    """Hash a loaded model: its parts, its settings and every weight."""
    import torch

    digest = hashlib.sha256(f"{model}\0{model.max_seq_length}\0{model.prompts}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        # Seen as bytes, for numpy knows no bfloat16.
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(content.data)
    return digest.hexdigest()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its bar for loaded weights: a library prints nothing."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
