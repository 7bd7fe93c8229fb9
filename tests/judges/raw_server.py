"""A server on loopback that answers any path with a script of raw answers: status, body, headers.

`tests.chat_server` is a chat API; this one is for what only a raw answer shows: other paths, error
bodies word by word.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["RawServer", "Request", "completion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What came in."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass
class RawServer:
    """Answers with the script's entries in turn, then with the last one for ever."""

    script: list[tuple[int, str]]
    seen: list[Request] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append(Request(path=self.path, headers=headers, body=body))
                status, text = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                payload = text.encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # Kept-alive connections end with the clients that hold them.
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def completion(text: str = "<verdict><better>[]</better><worse>[]</worse></verdict>") -> str:
    """Write a chat completion that says this."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "c", "object": "chat.completion", "model": "m", "choices": [choice]})
