"""An OpenAI-compatible chat server on loopback: real HTTP, scripted answers, every known fault.

    with ChatServer(from_key({("capital of France", "Paris is …"): "better"})) as server:
        server.fail("429", "reset", model="gpt-4o")      # its next two requests there
        client = AsyncOpenAI(base_url=server.base_url, api_key="none")
        ...
    assert server.counts == {"gpt-4o": 3}

It runs in a thread of its own, so that the code under test may use any loop, thread or process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Self

from aiohttp import web

from tests.chat_answers import (
    Answer,
    Answerer,
    Body,
    from_key,
    passages_shown,
    prompt_of,
    replay,
    synthetic,
    write_reply,
)

__all__ = [
    "FAULTS",
    "Answer",
    "ChatServer",
    "Fault",
    "Seen",
    "from_key",
    "passages_shown",
    "prompt_of",
    "replay",
    "synthetic",
    "write_reply",
]

# Faults that are a status with an error body: status, type, code, message.
_STATUSES: dict[str, tuple[int, str, str | None, str]] = {
    "400": (400, "invalid_request_error", None, "Unsupported parameter."),
    "401": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "403": (403, "invalid_request_error", None, "You do not have access to this project."),
    "404_model": (404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "429": (429, "requests", "rate_limit_exceeded", "Rate limit reached."),
    "500": (500, "server_error", None, "The server had an error."),
    "503": (503, "server_error", None, "The engine is overloaded."),
    "insufficient_quota": (429, "insufficient_quota", "insufficient_quota", "Quota exceeded."),
    "context_length": (
        400, "invalid_request_error", "context_length_exceeded", "Maximum context length exceeded."
    ),
    "content_filter": (400, "invalid_request_error", "content_filter", "The prompt was filtered."),
}  # fmt: skip
# Faults that are a status 200 with a body that no client can use.
_BODIES = {
    "html": ("text/html", "<html><body>Bad gateway</body></html>"),
    "broken_json": ("application/json", '{"id": "chatcmpl-1", "choices": [{"mess'),
    "no_choices": ("application/json", '{"id": "chatcmpl-1", "object": "chat.completion"}'),
}
# Faults that are an answer which says nothing usable.
_ANSWERS = ("empty", "truncated", "refusal", "wrong_ids", "both_lists")

FAULTS = (*_STATUSES, *_BODIES, *_ANSWERS, "timeout", "reset")


@dataclass(frozen=True, slots=True)
class Fault:
    """One of FAULTS, with headers of its own: `Fault("429", {"Retry-After": "1"})`."""

    kind: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"expected a fault of {FAULTS}, found {self.kind!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as it came in."""

    model: str
    body: Body
    headers: Mapping[str, str]
    time_s: float
    """On the monotonic clock."""

    @property
    def prompt(self) -> str:
        return prompt_of(self.body)


def _spoil(answer: Answer, kind: str) -> Answer:
    """Turn an answer into one that says nothing usable."""
    if kind == "empty":
        return replace(answer, text="")
    if kind == "truncated":
        return replace(answer, text=answer.text[: len(answer.text) // 2], finish_reason="length")
    if kind == "refusal":
        return replace(answer, text="", refusal="I'm sorry, I cannot help with that.")
    if answer.text.startswith("{"):
        return replace(answer, text=_spoil_json(answer.text, kind))
    doc = "[Doc (999)]" if kind == "wrong_ids" else "[Doc (1)]"
    lists = f"<better>{doc}</better>\n<worse>{'[]' if kind == 'wrong_ids' else doc}</worse>"
    text = re.sub(r"<better>.*</worse>", lists, answer.text, flags=re.DOTALL)
    return replace(answer, text=text)


def _spoil_json(text: str, kind: str) -> str:
    if kind == "both_lists":  # the nearest that an object has to it: every key twice
        return f"{text[:-1]}, {text[1:]}"
    *entries, (_, last) = json.loads(text).items()
    return json.dumps({**dict(entries), "doc_999": last})


class ChatServer:
    """The server, up between `with` and the end of its block.

    Attributes:
        answer: What replies; may be set at any time.
        latency_s: How long every reply takes, faults included.
        headers: Sent with every reply, such as `x-ratelimit-remaining-requests`.
        seen: Every request to the chat endpoint, in the order of arrival.
        ended: By its place in `seen`, when each request's reply went out or was given up, on the
            monotonic clock.
        answered: How many requests of each model got an answer, hence were paid for.
        max_in_flight: The most requests that were open at once.

    Leaving the block raises what `answer` raised, for a client may have hidden it.
    """

    def __init__(
        self,
        answer: Answerer = synthetic,
        *,
        latency_s: float = 0.0,
        models: Sequence[str] = ("gpt-4o-mini", "gpt-4o"),
        fault_rate: float = 0.0,
        fault_kinds: Sequence[str] = ("500",),
        seed: int = 0,
    ) -> None:
        self.answer = answer
        self.latency_s = latency_s
        self.headers: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.ended: dict[int, float] = {}
        self.answered: Counter[str] = Counter()
        self.max_in_flight = 0
        self.port = 0
        self._models = models
        self._rate = (fault_rate, tuple(fault_kinds), seed)
        self._queued: list[tuple[Fault | None, str | None]] = []
        self._bodies: Counter[str] = Counter()
        self._in_flight = 0
        self._errors: list[Exception] = []

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def counts(self) -> dict[str, int]:
        """How many requests asked for each model."""
        return dict(Counter(seen.model for seen in self.seen))

    def fail(self, *faults: str | Fault | None, model: str | None = None) -> None:
        """Meet the next requests with these faults, one each; None lets one pass.

        Args:
            faults: Kinds of FAULTS, or faults with headers.
            model: Only requests for this model count; the others pass.
        """
        made = [Fault(fault) if isinstance(fault, str) else fault for fault in faults]
        self._queued += [(fault, model) for fault in made]

    def __enter__(self) -> Self:
        ready: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), name="chat-server", daemon=True
        )
        self._thread.start()
        self.port = ready.result(timeout=10)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(timeout=10)
        if self._errors and kind is None:
            raise self._errors[0]

    async def _serve(self, ready: Future[int]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        self._add_routes(app)
        # Cancellation: a client that gave up must not count as in flight any longer.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
            ready.set_result(runner.addresses[0][1])
            await self._closing.wait()
            # A connection that came this moment takes some rounds of the loop to be set up; a
            # listener that closes before leaks it.
            await asyncio.sleep(0.01)
        finally:
            await runner.cleanup()

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._list_models)

    async def _list_models(self, _: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "owned_by": "tests"} for name in self._models]
        return web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        model, place = body["model"], len(self.seen)
        self.seen.append(Seen(model=model, body=body, headers=headers, time_s=time.monotonic()))
        fault = self._next_fault(body)
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            return await self._respond(request, body, fault)
        finally:
            self.ended[place] = time.monotonic()
            self._in_flight -= 1

    def _next_fault(self, body: Body) -> Fault | None:
        for position, (fault, model) in enumerate(self._queued):
            if model in (None, body["model"]):
                del self._queued[position]
                return fault
        rate, kinds, seed = self._rate
        if not rate:
            return None
        # By what is asked and how often it was, so that no order of arrival changes who fails.
        text = json.dumps(body, sort_keys=True)
        self._bodies[text] += 1
        draw = random.Random(f"{seed}:{self._bodies[text]}:{text}")
        return Fault(draw.choice(kinds)) if draw.random() < rate else None

    async def _respond(
        self, request: web.Request, body: Body, fault: Fault | None
    ) -> web.StreamResponse:
        kind = fault.kind if fault else ""
        headers = {**self.headers, **(fault.headers if fault else {})}
        if kind == "timeout":
            await self._closing.wait()
        if kind in ("timeout", "reset"):
            return _hang_up(request)
        if kind in _STATUSES:
            status, error_type, code, message = _STATUSES[kind]
            error = {"message": message, "type": error_type, "param": None, "code": code}
            return web.json_response({"error": error}, status=status, headers=headers)
        if kind in _BODIES:
            content_type, text = _BODIES[kind]
            return web.Response(text=text, content_type=content_type, headers=headers)
        try:
            answer = self.answer(body)
        except Exception as error:
            self._errors.append(error)
            raise
        answer = Answer(text=answer) if isinstance(answer, str) else answer
        self.answered[body["model"]] += 1
        completion = _completion(body, _spoil(answer, kind) if kind else answer)
        return web.json_response(completion, headers=headers)


def _hang_up(request: web.Request) -> web.Response:
    """Drop the connection at once, so that the client sees a reset and not an end."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


def _completion(body: Body, answer: Answer) -> dict[str, Any]:
    prompt = prompt_of(body)
    message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    tokens = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(answer.text) // 4}
    usage = answer.usage or {**tokens, "total_tokens": sum(tokens.values())}
    return {
        "id": "chatcmpl-" + hashlib.sha256(prompt.encode()).hexdigest()[:12],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answer.model or body["model"],
        "choices": [{**choice, "logprobs": None}],
        **({"usage": usage} if answer.has_usage else {}),
    }
