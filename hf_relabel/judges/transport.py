"""Transports: how the bytes of a call go out and come back.

The openai client builds a typed model of every request and reply, which costs 1.6 to 3.2 ms of CPU a
call and caps one process at 300 to 540 calls/s, where bare aiohttp does a thousand (measured on two
cores). So its request is built once and used as a template: address, key and headers are the
client's own, Azure's too, and each call sends its body through a plain aiohttp session. Where a
client has an HTTP client of its own (a proxy, certificates, a test's), or builds requests in a way
that is not known here, calls go through the client itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.request import getproxies

from hf_relabel.errors import AccountError
from hf_relabel.judges.faults import Fault, fault_of_exception
from hf_relabel.texts import json_string

if TYPE_CHECKING:
    import aiohttp
    from openai import AsyncOpenAI

__all__ = ["Answer", "Transport", "transport_for"]

_PATH = "/chat/completions"
_TEMPLATE_MAX_AGE_S = 60.0
"""After this a template is built anew: the client refreshes short-lived tokens as it builds one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back over HTTP.

    Attributes:
        status: The HTTP status.
        headers: By lower-case names.
        body: The raw text.
    """

    status: int
    headers: Mapping[str, str]
    body: str


class Transport(Protocol):
    """Sends one chat completion and returns what came back, whatever it is."""

    async def send(self, body: Mapping[str, Any]) -> Answer | Fault:
        """Send a request body; a fault means that no answer came at all."""
        ...

    async def close(self) -> None: ...


def transport_for(client: AsyncOpenAI, timeout_s: float) -> Transport:
    """Return the fast road for a client that would take the ordinary one anyway, else its own."""
    from openai import DefaultAioHttpClient, DefaultAsyncHttpxClient

    inner = getattr(client, "_client", None)
    is_ordinary = type(inner).__mro__[1:2] == (DefaultAsyncHttpxClient,) or type(inner) in (
        DefaultAioHttpClient,
        DefaultAsyncHttpxClient,
    )
    if is_ordinary and hasattr(client, "_build_request") and hasattr(client, "_prepare_options"):
        return _SessionTransport(client, timeout_s)
    return _ClientTransport(client)


class _SessionTransport:
    """Sends bodies through an aiohttp session, under the client's own address and headers."""

    def __init__(self, client: AsyncOpenAI, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._template: tuple[str, dict[str, str]] | None = None
        self._built_at = 0.0
        self._building = asyncio.Lock()

    async def send(self, body: Mapping[str, Any]) -> Answer | Fault:
        import aiohttp

        try:
            url, headers = await self._request(body)
            data = _encoded(body)
            post = self._open_session().post(url, data=data, headers=headers)
            async with post as response:
                text = (await response.read()).decode("utf-8", "replace")
                return Answer(response.status, _Lowered(response.headers), text)
        except aiohttp.ClientConnectorError as error:
            return fault_of_exception(error.os_error, is_sent=False)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return fault_of_exception(getattr(error, "os_error", error))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._client.close()

    async def _request(self, body: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        if self._template is None or time.monotonic() - self._built_at > _TEMPLATE_MAX_AGE_S:
            async with self._building:
                if self._template is None or time.monotonic() - self._built_at > 1.0:
                    self._template = await self._build(body)
                    self._built_at = time.monotonic()
        return self._template

    async def _build(self, body: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        from openai import OpenAIError
        from openai._models import FinalRequestOptions

        options = FinalRequestOptions(method="post", url=_PATH, json_data={"model": body["model"]})
        try:
            request = self._client._build_request(await self._client._prepare_options(options))
        except OpenAIError as error:
            raise AccountError(
                f"the client cannot build a request: {error}", reason="no_key"
            ) from error
        # Lengths and encodings are of the body and the session that this template is used with.
        ours = ("content-length", "accept-encoding", "connection", "host")
        return str(request.url), {k: v for k, v in request.headers.items() if k not in ours}

    def _open_session(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                # With this on, aiohttp looks for a proxy in a thread before each call.
                trust_env=bool(getproxies()),
            )
        return self._session


def _encoded(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON; its messages are nearly all of it."""
    rest = {name: value for name, value in body.items() if name != "messages"}
    messages = [
        b'{"role": %b, "content": %b}' % (json_string(each["role"]), json_string(each["content"]))
        for each in body["messages"]
    ]
    head = json.dumps(rest, ensure_ascii=False).encode("utf-8", "replace")
    return b'%b, "messages": [%b]}' % (head[:-1], b", ".join(messages))


class _ClientTransport:
    """Sends bodies through the openai client itself: any client, at a third of the speed."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client

    async def send(self, body: Mapping[str, Any]) -> Answer | Fault:
        import httpx2
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = await self._client.post(
                _PATH, body=dict(body), cast_to=httpx2.Response, options={"max_retries": 0}
            )
        except APIStatusError as error:
            return Answer(error.status_code, error.response.headers, error.response.text)
        except APITimeoutError as error:
            return fault_of_exception(TimeoutError(str(error)))
        except (APIConnectionError, httpx2.HTTPError, OSError) as error:
            is_sent = not isinstance(error.__cause__, httpx2.ConnectError)
            return fault_of_exception(getattr(error, "os_error", error), is_sent=is_sent)
        return Answer(response.status_code, response.headers, response.text)

    async def close(self) -> None:
        await self._client.close()


class _Lowered(Mapping[str, str]):
    """Headers by lower-case names; aiohttp's own table knows no case."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def __getitem__(self, name: str) -> str:
        return self._headers[name]

    def __iter__(self) -> Any:
        return (name.lower() for name in self._headers)

    def __len__(self) -> int:
        return len(self._headers)
