"""A chat server for benchmarks, in a process of its own: answers after a while, and does no more.

It speaks HTTP over a bare asyncio protocol, so that it leaves the machine to what is measured.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

__all__ = ["chat_server"]

_VERDICT = (
    "<thinking>\n" + "\n".join(f"Doc ({i}): {'reasoning ' * 12}" for i in range(1, 16))
    + "\n</thinking>\n<verdict>\n<better>[]</better>\n<worse>[]</worse>\n</verdict>"
)  # fmt: skip
_PAYLOAD = json.dumps(
    {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "bench",
        "choices": [{"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": _VERDICT}}],
        "usage": {"prompt_tokens": 2500, "completion_tokens": 500, "total_tokens": 3000},
    }
).encode()  # fmt: skip
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_PAYLOAD),
    _PAYLOAD,
)


@contextmanager
def chat_server(latency_s: float) -> Iterator[str]:
    """Serve while the block runs; yields the base URL."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, latency_s), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.terminate()
        process.join()


class _Chat(asyncio.Protocol):
    """One connection: reads whole requests, and answers each after the latency."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head = self._data.find(b"\r\n\r\n")
        while head >= 0:
            fields = bytes(self._data[:head]).lower()
            start = fields.find(b"content-length:") + len(b"content-length:")
            length = int(fields[start:].split(b"\r\n", 1)[0])
            if len(self._data) < head + 4 + length:
                return
            del self._data[: head + 4 + length]
            asyncio.get_running_loop().call_later(self._latency_s, self._answer)
            head = self._data.find(b"\r\n\r\n")

    def _answer(self) -> None:
        self._transport.write(_ANSWER)  # type: ignore[attr-defined]


def _serve(pipe: Connection, latency_s: float) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Chat(latency_s), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    sys.setswitchinterval(0.05)
    asyncio.run(run())
