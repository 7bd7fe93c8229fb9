"""Endpoints: where calls go, and the openai client that knows how to get there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_relabel.errors import AccountError, SettingError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["Endpoint"]

_OPENAI = "https://api.openai.com/v1"
_SECRET_NAME = re.compile(r"auth|key|token|cookie|secret|passw|credential|sig=", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where calls go, and what they carry; all that a worker process needs to build a client.

    Attributes:
        base_url: An OpenAI-compatible address, ending in `/v1` as a rule; None is OpenAI's own,
            whatever OPENAI_BASE_URL says: a fingerprint names the host that answered.
        azure_endpoint: An Azure OpenAI resource instead; needs `api_version`.
        api_version: Azure's API version.
        organization: OpenAI organization id.
        headers: More headers for every call.
        timeout_s: Longest wait for one whole reply.
    """

    base_url: str | None = None
    azure_endpoint: str | None = None
    api_version: str | None = None
    organization: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, _ in self.headers:
            if _SECRET_NAME.search(name):
                raise SettingError(
                    f"expected headers without secrets, found {name!r}: settings are pickled and "
                    "hashed. Give the key as `api_key`, or build the client in a `client` function."
                )
        for url in (self.base_url, self.azure_endpoint):
            if url is not None:
                _check_address(url)
        if self.azure_endpoint is not None and self.base_url is not None:
            raise SettingError("expected base_url or azure_endpoint, found both. Leave one out.")
        if self.azure_endpoint is not None and not self.api_version:
            raise SettingError(
                "expected an api_version with azure_endpoint, found none. Take one from Azure's "
                "documentation, such as '2024-10-21'."
            )

    @property
    def host(self) -> str:
        """The host that answers; without the port, which local servers change at every start."""
        return urlsplit(self.azure_endpoint or self.base_url or "").hostname or "api.openai.com"

    def connect(self, api_key: str | None) -> AsyncOpenAI:
        """Build the openai client; without a key it takes the one its own documentation names."""
        from openai import AsyncAzureOpenAI, AsyncOpenAI, DefaultAioHttpClient, OpenAIError

        shared: dict[str, Any] = {
            "api_key": api_key,
            "organization": self.organization,
            "default_headers": dict(self.headers),
            "timeout": self.timeout_s,
            "max_retries": 0,
            "http_client": DefaultAioHttpClient(timeout=self.timeout_s),
        }
        try:
            if self.azure_endpoint is None:
                return AsyncOpenAI(base_url=self.base_url or _OPENAI, **shared)
            return AsyncAzureOpenAI(
                azure_endpoint=self.azure_endpoint, api_version=self.api_version, **shared
            )
        except OpenAIError as error:
            raise AccountError(
                f"expected an API key, found none ({error}) Set OPENAI_API_KEY, or give `api_key`; "
                "a local server takes any word.",
                reason="no_key",
            ) from error


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or _SECRET_NAME.search(parts.query):
        raise SettingError(
            "expected an address without a secret, found one with '@' or a key. Give the key as "
            "`api_key`, or build the client in a `client` function."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(
            f"expected an address that starts with http:// or https://, found {url!r}."
        )
