"""Callbacks: relabel while a model trains; they decide when actions apply, never which."""

from __future__ import annotations

__all__: list[str] = []
