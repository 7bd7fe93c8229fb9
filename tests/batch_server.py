"""The chat server with a Batch API: files, batches, and every way in which a batch can end.

with BatchServer(from_key(KEY)) as server:
    server.ends += [End("expired", share=0.5)]      # its next batch answers half, then expires
    ...
assert set(server.processed.values()) == {1}
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.chat_answers import Answer
from tests.chat_server import _STATUSES, ChatServer, _completion

__all__ = ["BatchServer", "End"]

_ENDED = ("completed", "failed", "expired", "cancelled")
MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000


@dataclass(frozen=True, slots=True)
class End:
    """How one batch ends.

    Attributes:
        status: "completed", "expired", "cancelled" or "failed".
        share: The first share of its requests (in a shuffled order) that is answered.
        faults: Position in the input file → a fault of the chat server, as that line's error.
        errors: Of a failed batch: (code, line or None, message).
        cut: Positions whose line is in no file at all.
    """

    status: str = "completed"
    share: float = 1.0
    faults: Mapping[int, str] = field(default_factory=dict)
    errors: Sequence[tuple[str, int | None, str]] = ()
    cut: Sequence[int] = ()


class BatchServer(ChatServer):
    """A chat server that takes batches too.

    Attributes:
        ends: How the next batches end, one each; then all complete.
        held_from: No batch ends from this one on, while it is set.
        batches: Every batch by its id, as the API shows it.
        processed: How often each `custom_id` was answered, hence paid for.
        sent: How often each `custom_id` was in a batch that was accepted.
        create_faults: Met by the next calls that make a batch: a fault of the chat server, or
            "made_500" (made, and then an error), "no_file", or "hang".
        hangs_after_create: Whether the answer to a batch made never comes.
        download_faults: Met by the next downloads: "403", "404_model" or "500".
        files: Every file by its id; those deleted, too, so that a test can look at them.
        deleted: The ids of the files that were deleted.
        delete_faults: Met by the next deletions, likewise.
        max_enqueued_tokens: A batch that makes more of them wait fails; None takes all.
        page: How many batches a page of the list shows.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ends: list[End] = []
        self.held_from: int | None = None
        self.batches: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.processed: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.create_faults: list[str] = []
        self.hangs_after_create = False
        self.download_faults: list[str] = []
        self.deleted: list[str] = []
        self.delete_faults: list[str] = []
        self.max_enqueued_tokens: float = math.inf
        self.max_waiting_tokens = 0
        self.page = 2
        self._waiting_tokens: dict[str, int] = {}
        self._random = random.Random(0)
        self._tasks: set[asyncio.Task[None]] = set()

    def requests(self, batch_id: str) -> list[dict[str, Any]]:
        """Return the lines of a batch's input file."""
        data = self.files[self.batches[batch_id]["input_file_id"]]
        return [json.loads(line) for line in data.splitlines()]

    def _add_routes(self, app: web.Application) -> None:
        super()._add_routes(app)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_delete("/v1/files/{id}", self._delete)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._retrieve)
        app.router.add_post("/v1/batches/{id}/cancel", self._cancel)

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        assert form["purpose"] == "batch"
        data = upload.file.read()
        assert len(data) <= MAX_BYTES
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = data
        return web.json_response(
            {
                "id": file_id, "object": "file", "bytes": len(data), "purpose": "batch",
                "created_at": int(time.time()), "filename": upload.filename, "status": "processed",
            }
        )  # fmt: skip

    async def _delete(self, request: web.Request) -> web.Response:
        if self.delete_faults:
            return _refusal(self.delete_faults.pop(0))
        file_id = request.match_info["id"]
        if file_id in self.deleted or file_id not in self.files:
            return _error(404, f"No such File object: {file_id}", None)
        users = [batch for batch in self.batches.values() if batch["input_file_id"] == file_id]
        assert all(batch["status"] in _ENDED for batch in users), "a batch still reads it"
        self.deleted.append(file_id)
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: web.Request) -> web.Response:
        if self.download_faults:
            return _refusal(self.download_faults.pop(0))
        if request.match_info["id"] in self.deleted:
            return _error(404, "No such File object.", None)
        return web.Response(body=self.files[request.match_info["id"]])

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        fault = self.create_faults.pop(0) if self.create_faults else ""
        if fault == "no_file":
            return _error(400, f"Cannot find file {body['input_file_id']}.", "invalid_request")
        if fault == "hang":
            await self._closing.wait()
        if fault not in ("", "made_500"):
            return _refusal(fault)
        batch_id = f"batch_{len(self.batches)}"
        end = self.ends.pop(0) if self.ends else End()
        batch = self.batches[batch_id] = {
            "id": batch_id, "object": "batch", "endpoint": body["endpoint"], "status": "validating",
            "input_file_id": body["input_file_id"], "created_at": int(time.time()),
            "completion_window": body["completion_window"], "metadata": body.get("metadata"),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        task = asyncio.create_task(self._carry_out(batch, end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.hangs_after_create:
            await self._closing.wait()
        return _refusal("500") if fault else web.json_response(batch)

    async def _list(self, request: web.Request) -> web.Response:
        newest_first = list(self.batches.values())[::-1]
        after = request.query.get("after")
        ids = [batch["id"] for batch in newest_first]
        start = ids.index(after) + 1 if after else 0
        page = newest_first[start : start + self.page]
        more = start + self.page < len(newest_first)
        return web.json_response(
            {
                "object": "list", "data": page, "has_more": more,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )  # fmt: skip

    async def _retrieve(self, request: web.Request) -> web.Response:
        batch = self.batches.get(request.match_info["id"])
        return web.json_response(batch) if batch else _error(404, "No batch found.", None)

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "cancelling"
        return web.json_response(batch)

    async def _carry_out(self, batch: dict[str, Any], end: End) -> None:
        lines = self.requests(batch["id"])
        tokens = len(self.files[batch["input_file_id"]]) // 4
        if end.status == "failed" or not self._takes(batch, lines, tokens):
            errors = end.errors or [
                (
                    "token_limit_exceeded",
                    None,
                    f"Limit: {self.max_enqueued_tokens:,} enqueued tokens.",
                )
            ]
            data = [{"code": c, "line": n, "message": m, "param": None} for c, n, m in errors]
            batch.update(status="failed", errors={"object": "list", "data": data})
            return
        self._waiting_tokens[batch["id"]] = tokens
        self.max_waiting_tokens = max(self.max_waiting_tokens, sum(self._waiting_tokens.values()))
        self.sent.update(line["custom_id"] for line in lines)
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        await asyncio.sleep(self.latency_s)
        while self._holds(batch) and batch["status"] != "cancelling":
            await asyncio.sleep(0.005)
        status = "cancelled" if batch["status"] == "cancelling" else end.status
        output, errors = self._answers(lines, end, status)
        for name, rows in (("output", output), ("error", errors)):
            if rows:
                file_id = f"file-{name}-{batch['id']}"
                self.files[file_id] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
                batch[f"{name}_file_id"] = file_id
        counts = {"total": len(lines), "completed": len(output), "failed": len(errors)}
        del self._waiting_tokens[batch["id"]]
        batch.update(status=status, request_counts=counts)

    def _holds(self, batch: dict[str, Any]) -> bool:
        return self.held_from is not None and int(batch["id"].split("_")[1]) >= self.held_from

    def _takes(self, batch: dict[str, Any], lines: list[dict[str, Any]], tokens: int) -> bool:
        ids = [line["custom_id"] for line in lines]
        assert len(set(ids)) == len(ids) <= MAX_REQUESTS
        assert len({line["body"]["model"] for line in lines}) == 1
        assert {line["url"] for line in lines} == {batch["endpoint"]} == {"/v1/chat/completions"}
        return sum(self._waiting_tokens.values()) + tokens <= self.max_enqueued_tokens

    def _answers(
        self, lines: list[dict[str, Any]], end: End, status: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        order = [index for index in range(len(lines)) if index not in end.cut]
        self._random.shuffle(order)
        n_answered = math.ceil(end.share * len(order))
        output, errors = [], []
        for position, index in enumerate(order):
            line = lines[index]
            row: dict[str, Any] = {"id": f"req_{index}", "custom_id": line["custom_id"]}
            if position >= n_answered:
                code, words = f"batch_{status}", f"This request is not executed: {status}."
                errors.append({**row, "response": None, "error": {"code": code, "message": words}})
            elif index in end.faults:
                number, kind, code, message = _STATUSES[end.faults[index]]
                error = {"message": message, "type": kind, "code": code, "param": None}
                response = {"status_code": number, "request_id": "r", "body": {"error": error}}
                errors.append({**row, "response": response, "error": None})
            else:
                self.processed[line["custom_id"]] += 1
                response = {
                    "status_code": 200,
                    "request_id": "r",
                    "body": self._reply(line["body"]),
                }
                output.append({**row, "response": response, "error": None})
        return output, errors

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.answer(body)
        return _completion(body, Answer(text=answer) if isinstance(answer, str) else answer)


def _refusal(fault: str) -> web.Response:
    status, kind, code, message = _STATUSES[fault]
    return _error(status, message, code, kind)


def _error(status: int, message: str, code: str | None, kind: str = "invalid") -> web.Response:
    error = {"message": message, "type": kind, "code": code, "param": None}
    return web.json_response({"error": error}, status=status)
