"""Faults: what status, body and headers mean for a row and for the run."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from hf_relabel.errors import AccountError, JudgeError
from hf_relabel.judges.faults import (
    Fault,
    fault_of_body,
    fault_of_exception,
    fault_of_status,
    retry_after_s,
)


def error(**values: Any) -> str:
    return json.dumps({"error": {"message": "words", **values}})


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (401, error(code="invalid_api_key"), "stop", "unauthorized"),
        (402, error(code=402), "stop", "quota"),
        (403, error(), "stop", "forbidden"),
        (404, error(code="model_not_found"), "stop", "unknown_model"),
        (404, "<html>", "stop", "unknown_model"),
        (429, error(code="insufficient_quota"), "stop", "quota"),
        (429, error(type="insufficient_quota", code="429"), "stop", "quota"),
        (400, error(code="billing_hard_limit_reached"), "stop", "quota"),
        (429, error(code="rate_limit_exceeded"), "retry", "rate_limit"),
        (429, "", "retry", "rate_limit"),
        (408, error(), "retry", "timeout"),
        (409, error(), "retry", "conflict"),
        (500, error(), "retry", "server_error"),
        (503, "<html>upstream</html>", "retry", "overloaded"),
        (529, error(type="overloaded_error"), "retry", "overloaded"),
        (400, error(code="context_length_exceeded"), "row", "context_length"),
        (400, error(code="string_above_max_length"), "row", "context_length"),
        # vLLM and llama.cpp give no code that tells.
        (
            400,
            json.dumps(
                {"object": "error", "message": "maximum context length is 4096", "code": 400}
            ),
            "row",
            "context_length",
        ),
        (400, error(message="exceeds the available context size"), "row", "context_length"),
        (400, error(code="content_filter"), "row", "content_filter"),
        (400, error(code="ResponsibleAIPolicyViolation"), "row", "content_filter"),
        (400, error(message="see content_filter_result"), "row", "content_filter"),
        (400, error(code="unsupported_parameter", param="seed"), "row", "parameter"),
        (400, error(), "row", "bad_request"),
        (422, json.dumps({"detail": "no"}), "row", "bad_request"),
        (400, "not json", "row", "bad_request"),
        (400, "[]", "row", "bad_request"),
        (400, json.dumps({"error": "plain words"}), "row", "bad_request"),
    ],
)
def test_what_a_status_means(status: int, body: str, kind: str, reason: str) -> None:
    fault = fault_of_status(status, body, {})

    assert (fault.kind, fault.reason) == (kind, reason)
    assert fault.message.startswith(f"HTTP {status}: ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (error(), "HTTP 400: words"),
        (json.dumps({"error": "plain words"}), "HTTP 400: plain words"),
        (json.dumps({"message": "flat"}), "HTTP 400: flat"),
        ("<html>" + "x" * 500, "HTTP 400: <html>" + "x" * 194),
        ("", "HTTP 400: no message"),
    ],
)
def test_the_message_is_the_servers_and_short(body: str, words: str) -> None:
    assert fault_of_status(400, body, {}).message == words


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("temperature", "temperature"),
        ("response_format.json_schema", "response_format"),
        (None, None),
    ],
)
def test_a_refused_parameter_is_named(param: str | None, named: str | None) -> None:
    body = error(code="unsupported_value", param=param)

    assert fault_of_status(400, body, {}).parameter == named


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    """An endless or unreadable wait is none: our own backoff holds then."""
    assert retry_after_s(headers) == seconds


def test_a_wait_until_a_date() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)

    assert retry_after_s({"retry-after": then}) == pytest.approx(600, abs=30)


@pytest.mark.parametrize(("status", "asked"), [(429, 7.0), (503, 7.0), (408, 7.0), (401, None)])
def test_only_what_is_sent_again_has_a_wait(status: int, asked: float | None) -> None:
    assert fault_of_status(status, error(), {"retry-after": "7"}).retry_after_s == asked


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>Bad gateway</html>", "html"),
        ("  \n<!doctype html>", "html"),
        ('{"id": "c", "choices": [{"mess', "broken_json"),
        ("", "broken_json"),
        ("{}", "no_choices"),
        ('{"choices": []}', "no_choices"),
        ('{"choices": null}', "no_choices"),
        ('{"choices": ["text"]}', "no_choices"),
        ('{"choices": {"0": {}}}', "no_choices"),
        ("[]", "no_choices"),
        ('"words"', "no_choices"),
    ],
)
def test_a_200_without_a_reply_is_sent_again(body: str, reason: str) -> None:
    fault = fault_of_body(body)

    assert isinstance(fault, Fault)
    assert (fault.kind, fault.reason) == ("retry", reason)


def test_a_200_with_choices_is_handed_on() -> None:
    assert fault_of_body('{"choices": [{}]}') == {"choices": [{}]}


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (TimeoutError("slow"), "timeout"),
        (ConnectionResetError("reset"), "connection"),
        (OSError("no route"), "connection"),
    ],
)
def test_a_call_without_an_answer_is_sent_again(raised: BaseException, reason: str) -> None:
    fault = fault_of_exception(raised)

    assert (fault.kind, fault.reason) == ("retry", reason)
    assert str(raised) in fault.message


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "Set a valid key"),
        (402, "Add credit"),
        (403, "may not use the model"),
        (404, "Check the model's name"),
    ],
)
def test_an_account_error_says_what_to_do(status: int, advice: str) -> None:
    found = fault_of_status(status, error(), {}).error("strong")

    assert isinstance(found, AccountError)
    assert str(found).startswith(f"judge 'strong': HTTP {status}: words")
    assert advice in str(found)


def test_a_row_fault_becomes_a_judge_error_that_survives_a_pickle() -> None:
    found = fault_of_status(400, error(code="content_filter"), {}).error("strong")

    copy = pickle.loads(pickle.dumps(found))  # noqa: S301
    assert type(found) is type(copy) is JudgeError
    assert (str(copy), copy.reason) == (str(found), "content_filter")
