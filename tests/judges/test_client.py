"""The road to a chat model: real HTTP on loopback, every fault, and no key in any error."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from hf_relabel import background
from hf_relabel.errors import AccountError, JudgeError, SettingError
from hf_relabel.judges.client import ChatClient, RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.faults import Fault
from hf_relabel.judges.limits import Ceilings, Limiter
from hf_relabel.questions import Reply
from tests import chat_server as chat
from tests.chat_server import Answer, ChatServer
from tests.judges.raw_server import RawServer, completion

KEY = "sk-test-0123456789abcdef"
PLAIN_KEY = "plainword0123456789"  # no shape that a pattern would know
QUICK = RetryRule(max_attempts=3, first_wait_s=0.001, max_wait_s=0.002)
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Doc (1): a"}]}
WAIT_S = 30


def new_client(
    client: AsyncOpenAI, *, retry: RetryRule = QUICK, max_concurrency: int = 8, timeout_s: float = 5
) -> ChatClient:
    limiter = Limiter(Ceilings(max_concurrency=max_concurrency))
    return ChatClient("strong", client, limiter=limiter, retry=retry, timeout_s=timeout_s)


def complete(
    base_url: str,
    body: dict[str, Any] = BODY,
    *,
    n_times: int = 1,
    retry: RetryRule = QUICK,
    api_key: str = KEY,
    max_concurrency: int = 8,
    **endpoint: Any,
) -> list[Reply]:
    """Send the same call some times with one client, one after another."""
    where = Endpoint(base_url=base_url, **endpoint)

    async def send_all() -> list[Reply]:
        client = new_client(where.connect(api_key), retry=retry, max_concurrency=max_concurrency)
        return [await asyncio.wait_for(client.complete(body), WAIT_S) for _ in range(n_times)]

    return background.run(send_all())


def error_body(message: str = "words", **values: Any) -> str:
    return json.dumps({"error": {"message": message, "type": None, "param": None, **values}})


# Replies and faults


def test_a_reply_holds_all_that_the_server_said(chat_server: ChatServer) -> None:
    chat_server.answer = lambda _: Answer(text="hello", model="m-2026", finish_reason="length")

    (reply,) = complete(chat_server.base_url)

    assert (reply.text, reply.model, reply.finish_reason) == ("hello", "m-2026", "length")
    assert reply.usage["completion_tokens"] == 1
    assert reply.refusal is None
    assert 0 < reply.latency_s < WAIT_S
    assert chat_server.seen[0].body == BODY
    assert chat_server.seen[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_server_that_counts_no_tokens_leaves_them_unknown(chat_server: ChatServer) -> None:
    chat_server.answer = lambda _: Answer(text="hello", has_usage=False)

    assert complete(chat_server.base_url)[0].usage == {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "server_error"),
        ("503", "overloaded"),
        ("reset", "connection"),
        ("html", "html"),
        ("broken_json", "broken_json"),
        ("no_choices", "no_choices"),
        ("empty", "empty"),
    ],
)
def test_a_passing_fault_is_sent_again_until_it_passes_or_the_rule_ends(
    chat_server: ChatServer, fault: str, reason: str
) -> None:
    chat_server.fail(fault, fault)
    assert complete(chat_server.base_url)[0].text
    assert len(chat_server.seen) == 3

    chat_server.fail(fault, fault, fault)
    with pytest.raises(JudgeError, match="judge 'strong'") as found:
        complete(chat_server.base_url)

    assert type(found.value) is JudgeError
    assert found.value.reason == reason
    assert len(chat_server.seen) == 6


def test_a_rate_limit_is_waited_out_and_is_no_attempt(chat_server: ChatServer) -> None:
    chat_server.fail(*["429"] * 7)

    assert complete(chat_server.base_url)[0].text
    assert len(chat_server.seen) == 8


def test_a_rate_limit_that_never_ends_is_given_up_in_the_end(chat_server: ChatServer) -> None:
    chat_server.fail(*["429"] * 50)

    with pytest.raises(JudgeError, match="judge 'strong'") as found:
        complete(chat_server.base_url, retry=replace(QUICK, max_limited_s=0.01))

    assert found.value.reason == "rate_limit"
    assert len(chat_server.seen) < 50


def test_a_reply_that_never_comes_is_given_up(chat_server: ChatServer) -> None:
    chat_server.fail("timeout", "timeout", "timeout")

    with pytest.raises(JudgeError, match="judge 'strong'") as found:
        complete(chat_server.base_url, timeout_s=0.2)

    assert found.value.reason == "timeout"
    assert len(chat_server.seen) == 3


def test_a_server_that_is_not_there_is_a_row_fault() -> None:
    with ChatServer() as server:
        gone = server.base_url

    with pytest.raises(JudgeError, match="ConnectionRefusedError") as found:
        complete(gone)

    assert found.value.reason == "connection"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("401", "unauthorized"),
        ("403", "forbidden"),
        ("404_model", "unknown_model"),
        ("insufficient_quota", "quota"),
    ],
)
def test_an_account_fault_stops_at_once(chat_server: ChatServer, fault: str, reason: str) -> None:
    chat_server.fail(fault)

    with pytest.raises(AccountError, match="judge 'strong': HTTP 4") as found:
        complete(chat_server.base_url)

    assert found.value.reason == reason
    assert len(chat_server.seen) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400", "bad_request"),
        ("context_length", "context_length"),
        ("content_filter", "content_filter"),
    ],
)
def test_a_row_fault_is_final_for_its_row_alone(
    chat_server: ChatServer, fault: str, reason: str
) -> None:
    chat_server.fail(fault)

    with pytest.raises(JudgeError, match="judge 'strong': HTTP 400") as found:
        complete(chat_server.base_url)

    assert type(found.value) is JudgeError
    assert found.value.reason == reason
    assert len(chat_server.seen) == 1
    assert complete(chat_server.base_url)[0].text


@pytest.mark.parametrize("fault", ["truncated", "refusal", "wrong_ids", "both_lists"])
def test_an_unusable_reply_was_paid_for_and_comes_back(chat_server: ChatServer, fault: str) -> None:
    """Whether it can be read is not the client's to say: it must be counted first."""
    chat_server.fail(fault)

    (reply,) = complete(chat_server.base_url)

    assert reply.usage
    assert len(chat_server.seen) == 1
    assert (reply.finish_reason == "length") == (fault == "truncated")
    assert (reply.refusal is not None) == (fault == "refusal")


def test_every_fault_of_the_server_is_met_here() -> None:
    """A fault that is added there needs a place in the tables above."""
    met = {"429", "500", "503", "reset", "html", "broken_json", "no_choices", "empty", "timeout"}
    met |= {"401", "403", "404_model", "insufficient_quota"}
    met |= {"400", "context_length", "content_filter"}
    met |= {"truncated", "refusal", "wrong_ids", "both_lists"}

    assert set(chat.FAULTS) == met


# Waits and limits


def test_the_server_says_how_long_to_wait(chat_server: ChatServer) -> None:
    chat_server.fail(chat.Fault("429", {"retry-after-ms": "150"}))

    complete(chat_server.base_url)

    first, second = chat_server.seen
    assert second.time_s - first.time_s >= 0.15


@given(st.integers(1, 40), st.floats(0.01, 5), st.floats(0.01, 60), st.none() | st.floats(0, 500))
def test_a_wait_doubles_up_to_its_limit_and_never_undercuts_the_server(
    attempt: int, first: float, longest: float, asked: float | None
) -> None:
    rule = RetryRule(first_wait_s=first, max_wait_s=longest)
    fault = Fault(kind="retry", reason="r", message="m", retry_after_s=asked)

    wait = rule.wait_s(attempt, fault)

    plain = min(longest, first * 2 ** (attempt - 1))
    assert wait >= max(0.74 * plain, asked or 0.0)
    assert wait <= max(1.26 * plain, asked or 0.0)


def test_no_more_calls_are_in_flight_than_allowed(chat_server: ChatServer) -> None:
    chat_server.latency_s = 0.02
    where = Endpoint(base_url=chat_server.base_url)

    async def send_all() -> None:
        client = new_client(where.connect(KEY), max_concurrency=3)
        await asyncio.gather(*(client.complete(BODY) for _ in range(12)))

    background.run(send_all())

    assert chat_server.max_in_flight == 3
    assert len(chat_server.seen) == 12


# Parameters that a server does not take


@pytest.mark.parametrize("parameter", ["temperature", "seed", "reasoning_effort", "top_p"])
def test_a_parameter_named_in_a_400_is_dropped_and_remembered(parameter: str) -> None:
    """Not a failed attempt: it works under a rule that sends once."""
    refused = error_body(code="unsupported_value", param=parameter)
    body = {**BODY, "temperature": 0.1, "seed": 1, "reasoning_effort": "low", "top_p": 1}
    once = RetryRule(max_attempts=1)

    with RawServer([(400, refused), (200, completion())]) as server:
        complete(f"{server.address}/v1", body, n_times=2, retry=once)

    sent = [set(request.body) for request in server.seen]
    assert sent == [set(body), set(body) - {parameter}, set(body) - {parameter}]


def test_several_parameters_are_dropped_one_after_another() -> None:
    body = {**BODY, "temperature": 0.1, "seed": 1}
    script = [(400, error_body(param=name)) for name in ("temperature", "seed")]

    with RawServer([*script, (200, completion())]) as server:
        complete(f"{server.address}/v1", body, retry=RetryRule(max_attempts=1))

    assert [set(request.body) for request in server.seen][-1] == set(BODY)


@pytest.mark.parametrize("parameter", ["messages", "model", "max_completion_tokens", "top_p"])
def test_what_the_question_needs_or_did_not_send_is_never_dropped(parameter: str) -> None:
    """And a server that names it for ever cannot keep the client going."""
    body = {**BODY, "max_completion_tokens": 9}

    with (
        RawServer([(400, error_body(param=parameter))]) as server,
        pytest.raises(JudgeError, match="HTTP 400: words") as found,
    ):
        complete(f"{server.address}/v1", body)

    assert found.value.reason == "parameter"
    assert len(server.seen) == 1


# Secrets


@pytest.mark.parametrize("key", [KEY, PLAIN_KEY])
@pytest.mark.parametrize(
    "template",
    [
        error_body("Incorrect API key provided: {key}.", code="invalid_api_key"),
        error_body("Header 'Authorization: Bearer {key}' is wrong"),
        "no JSON, and cut to length in the middle of the key: " + "x" * 132 + " {key}",
        "<html>{key}</html>",
    ],
)
@pytest.mark.parametrize("status", [401, 400, 500])
def test_a_key_that_the_server_repeats_is_blanked(status: int, template: str, key: str) -> None:
    with (
        RawServer([(status, template.replace("{key}", key))]) as server,
        pytest.raises(JudgeError, match=r"HTTP \d+: ") as found,
    ):
        complete(f"{server.address}/v1", api_key=key)

    assert server.seen[0].headers["authorization"] == f"Bearer {key}"
    seen = f"{found.value} {found.value!r} {found.value.__cause__!r} {found.value.__context__!r}"
    assert key[:9] not in seen
    assert f"HTTP {status}" in seen


def test_a_key_in_a_page_that_is_no_reply_is_blanked() -> None:
    with (
        RawServer([(200, f"<html>Bearer {KEY}</html>")]) as server,
        pytest.raises(JudgeError, match="expected JSON") as found,
    ):
        complete(f"{server.address}/v1")

    assert KEY not in str(found.value)


def test_a_local_servers_one_letter_key_blanks_no_message() -> None:
    with (
        RawServer([(400, error_body("an explanation"))]) as server,
        pytest.raises(JudgeError, match="an explanation"),
    ):
        complete(f"{server.address}/v1", api_key="x")


def test_without_a_key_the_error_says_where_one_goes() -> None:
    with pytest.raises(AccountError, match="Set OPENAI_API_KEY, or give `api_key`") as found:
        Endpoint().connect(None)

    assert found.value.reason == "no_key"


@pytest.mark.parametrize(
    "name",
    ["Authorization", "X-API-Key", "api-key", "Cookie", "X-Auth-Token", "x-secret", "X-Password"],
)
def test_headers_that_look_like_secrets_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"expected headers without secrets, found '{name}'"):
        Endpoint(headers=(("X-Team", "search"), (name, KEY)))


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host/v1",
        f"https://host/v1?api_key={KEY}",
        f"https://host/v1?sig={KEY}",
    ],
)
@pytest.mark.parametrize("setting", ["base_url", "azure_endpoint"])
def test_addresses_with_secrets_are_refused_without_repeating_them(url: str, setting: str) -> None:
    with pytest.raises(SettingError, match="expected an address without a secret") as found:
        Endpoint(api_version="1", **{setting: url})  # type: ignore[arg-type]

    assert KEY not in str(found.value)


# Endpoints


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "starts with http:// or https://"),
        ({"base_url": "api.openai.com"}, "starts with http:// or https://"),
        ({"base_url": ""}, "starts with http:// or https://"),
        ({"azure_endpoint": "https://me.openai.azure.com"}, "expected an api_version"),
        (
            {"azure_endpoint": "https://a", "base_url": "https://b", "api_version": "1"},
            "found both",
        ),
    ],
)
def test_endpoints_that_cannot_work_are_refused(endpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Endpoint(**endpoint)


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        (Endpoint(), "api.openai.com"),
        (Endpoint(base_url="http://127.0.0.1:8000/v1"), "127.0.0.1"),
        (Endpoint(base_url="https://Host.example/a/b"), "host.example"),
        (Endpoint(azure_endpoint="https://me.azure.com/", api_version="1"), "me.azure.com"),
    ],
)
def test_the_host_has_no_port_and_no_path(endpoint: Endpoint, host: str) -> None:
    assert endpoint.host == host


def test_the_address_is_the_settings_and_never_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fingerprint names api.openai.com: an answer from elsewhere must not pass for one."""
    monkeypatch.setitem(os.environ, "OPENAI_BASE_URL", "http://127.0.0.1:1/v1")

    async def address() -> str:
        client = Endpoint().connect(KEY)
        try:
            return str(client.base_url)
        finally:
            await client.close()

    assert background.run(address()) == "https://api.openai.com/v1/"


def test_headers_and_organization_reach_the_server(chat_server: ChatServer) -> None:
    complete(chat_server.base_url, headers=(("X-Team", "search"),), organization="org-1")

    seen = chat_server.seen[0].headers
    assert (seen["x-team"], seen["openai-organization"]) == ("search", "org-1")


def test_an_azure_endpoint_gets_the_right_path_version_and_key() -> None:
    with RawServer([(200, completion("hello"))]) as server:
        where = Endpoint(azure_endpoint=server.address, api_version="2024-10-21")

        async def send() -> Reply:
            client = new_client(where.connect(KEY))
            return await asyncio.wait_for(client.complete({**BODY, "model": "my-4o"}), WAIT_S)

        assert background.run(send()).text == "hello"

    (request,) = server.seen
    path = "/openai/deployments/my-4o/chat/completions?api-version=2024-10-21"
    assert request.path == path
    assert request.headers["api-key"] == KEY


def test_a_client_that_nobody_holds_closes_its_connections(chat_server: ChatServer) -> None:
    """A judge a row would run out of sockets otherwise."""
    closed: list[bool] = []
    where = Endpoint(base_url=chat_server.base_url)

    def connect(make: Callable[[str], Any] = where.connect) -> Any:
        client = make(KEY)
        close = client.close

        async def close_and_tell() -> None:
            await close()
            closed.append(True)

        client.close = close_and_tell
        return client

    async def use_and_forget() -> None:
        client = new_client(connect())
        await client.complete(BODY)
        del client
        while not closed:
            await asyncio.sleep(0)

    background.run(asyncio.wait_for(use_and_forget(), WAIT_S))

    assert closed == [True]
