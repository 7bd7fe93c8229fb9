"""The tests' chat server behaves as servers do, seen through the clients that will meet it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from hf_relabel.errors import UnusableReplyError
from hf_relabel.prompts import load_prompt
from hf_relabel.questions import Question, Reply
from tests.chat_server import FAULTS, Answer, ChatServer, Fault, from_key, passages_shown, replay

QUESTION = Question(
    query="capital of France",
    positives=("Doc of truth: Paris.",),
    passages=("Paris is the capital.", "Cats sleep.\n\nA lot.", "Lyon was it once, not Paris."),
)
TRUTH = from_key({
    (QUESTION.query, QUESTION.passages[0]): "better",
    (QUESTION.query, "Lyon was it  once, not Paris."): "worse",
    ("another query", QUESTION.passages[1]): "better",
})  # fmt: skip


def body_of(prompt_name: str = "paper-strong", model: str = "gpt-4o") -> dict[str, Any]:
    prompt = load_prompt(prompt_name)
    body: dict[str, Any] = {"model": model, "messages": prompt.messages(QUESTION)}
    if response_format := prompt.response_format(len(QUESTION.passages)):
        body["response_format"] = response_format
    return body


def ask(server: ChatServer, body: dict[str, Any]) -> Any:
    """Ask with the real client, without its retries."""

    async def call() -> Any:
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key="none", max_retries=0, timeout=0.5
        ) as client:
            return await client.chat.completions.create(**body)

    return asyncio.run(call())


def reply_of(completion: Any) -> Reply:
    choice = completion.choices[0]
    return Reply(
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        refusal=choice.message.refusal,
    )


def test_passages_are_read_off_a_rendered_prompt() -> None:
    """Docs that the prompt only speaks of, and the ground truth, are not among them."""
    (_, user) = load_prompt("paper-strong").messages(QUESTION)

    assert passages_shown(user["content"]) == {
        1: "Paris is the capital.",
        2: "Cats sleep. A lot.",
        3: "Lyon was it once, not Paris.",
    }


@pytest.mark.parametrize("prompt_name", ["paper-cheap", "paper-strong", "paper-title", "graded"])
def test_answers_from_a_key_parse_in_every_protocol(
    chat_server: ChatServer, prompt_name: str
) -> None:
    chat_server.answer = TRUTH

    completion = ask(chat_server, body_of(prompt_name))

    verdicts = load_prompt(prompt_name).parse(reply_of(completion), 3, judge="test")
    assert [verdict.relevance.value for verdict in verdicts] == ["better", "not-relevant", "worse"]
    assert completion.usage.prompt_tokens == len(chat_server.seen[0].prompt) // 4
    assert chat_server.counts == chat_server.answered == {"gpt-4o": 1}


def test_a_repair_question_is_answered_like_the_first(chat_server: ChatServer) -> None:
    """What the model said before is part of the request, but not of what is asked."""
    chat_server.answer = TRUTH
    prompt = load_prompt("paper-cheap")
    first = Reply(text="Doc (1): nonsense")
    error = UnusableReplyError("no verdict", reason="no_verdict")

    body = {"model": "gpt-4o", "messages": prompt.repair(QUESTION, first, error)}
    verdicts = prompt.parse(reply_of(ask(chat_server, body)), 3, judge="test")

    assert [verdict.relevance.value for verdict in verdicts] == ["better", "not-relevant", "worse"]


def test_recorded_replies_are_found_by_model_and_query(chat_server: ChatServer) -> None:
    chat_server.answer = replay({"gpt-4o": {"France": "no", QUESTION.query: "recorded"}})

    assert ask(chat_server, body_of()).choices[0].message.content == "recorded"


def test_synthetic_answers_are_always_alike(chat_server: ChatServer) -> None:
    texts = {ask(chat_server, body_of()).choices[0].message.content for _ in range(2)}

    assert len(texts) == 1


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("401", openai.AuthenticationError, "invalid_api_key"),
        ("403", openai.PermissionDeniedError, None),
        ("404_model", openai.NotFoundError, "model_not_found"),
        ("429", openai.RateLimitError, "rate_limit_exceeded"),
        ("insufficient_quota", openai.RateLimitError, "insufficient_quota"),
        ("context_length", openai.BadRequestError, "context_length_exceeded"),
        ("content_filter", openai.BadRequestError, "content_filter"),
        ("400", openai.BadRequestError, None),
        ("500", openai.InternalServerError, None),
        ("503", openai.InternalServerError, None),
        ("timeout", openai.APITimeoutError, None),
        ("reset", openai.APIConnectionError, None),
    ],
)
def test_faults_reach_the_client_as_its_errors(
    chat_server: ChatServer, kind: str, error: type[openai.APIError], code: str | None
) -> None:
    chat_server.fail(kind)

    with pytest.raises(error) as caught:
        ask(chat_server, body_of())

    assert type(caught.value) is error
    assert caught.value.code == code
    assert chat_server.counts == {"gpt-4o": 1}
    assert not chat_server.answered


def test_unusable_bodies_pass_the_client(chat_server: ChatServer) -> None:
    """The client takes these for successes, or fails with an error that is not its own."""
    chat_server.fail("html", "no_choices", "broken_json")

    assert isinstance(ask(chat_server, body_of()), str)
    assert ask(chat_server, body_of()).choices is None
    with pytest.raises(json.JSONDecodeError):
        ask(chat_server, body_of())


@pytest.mark.parametrize("prompt_name", ["paper-strong", "graded"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty"),
        ("truncated", "truncated"),
        ("refusal", "refused"),
        ("wrong_ids", "unknown_id"),
        ("both_lists", {"paper-strong": "contradiction", "graded": "bad_json"}),
    ],
)
def test_spoiled_answers_are_unusable(
    chat_server: ChatServer, prompt_name: str, kind: str, reason: str | dict[str, str]
) -> None:
    chat_server.answer = TRUTH
    chat_server.fail(kind)

    with pytest.raises(UnusableReplyError, match="expected") as caught:
        load_prompt(prompt_name).parse(
            reply_of(ask(chat_server, body_of(prompt_name))), 3, judge="test"
        )

    assert caught.value.reason == (reason if isinstance(reason, str) else reason[prompt_name])


def test_faults_wait_for_their_model_and_carry_headers(chat_server: ChatServer) -> None:
    chat_server.fail(None, Fault("429", {"Retry-After": "7"}), model="gpt-4o")

    ask(chat_server, body_of(model="gpt-4o-mini"))
    ask(chat_server, body_of())
    with pytest.raises(openai.RateLimitError) as caught:
        ask(chat_server, body_of())

    assert caught.value.response.headers["retry-after"] == "7"
    assert chat_server.counts == {"gpt-4o-mini": 1, "gpt-4o": 2}


def test_an_answer_may_lack_usage_and_name_its_own_model(chat_server: ChatServer) -> None:
    chat_server.answer = lambda _: Answer(text="hm", model="gpt-4o-2024-11-20", has_usage=False)

    completion = ask(chat_server, body_of())

    assert completion.usage is None
    assert completion.model == "gpt-4o-2024-11-20"


def test_random_faults_depend_on_the_question_alone() -> None:
    """Whatever the order in which requests arrive, the same ones fail."""

    def failed(order: list[int]) -> set[int]:
        with ChatServer(fault_rate=0.5, fault_kinds=["500", "429"], seed=3) as server:
            statuses = asyncio.run(_post_all(server, order))
        return {number for number, status in zip(order, statuses, strict=True) if status != 200}

    forward = failed(list(range(20)))

    assert 0 < len(forward) < 20
    assert forward == failed(list(range(19, -1, -1)))


def test_requests_in_flight_are_counted() -> None:
    with ChatServer(latency_s=0.2) as server:
        asyncio.run(_post_all(server, list(range(30))))

    assert server.max_in_flight == 30
    assert len(server.seen) == 30


def test_an_error_of_the_answer_is_not_hidden_by_the_client() -> None:
    with (
        pytest.raises(LookupError, match="no known query"),
        ChatServer(replay({"gpt-4o": {}})) as server,
        pytest.raises(openai.InternalServerError),
    ):
        ask(server, body_of())


def test_a_hanging_request_does_not_hold_the_server_up(chat_server: ChatServer) -> None:
    """A client that gave up is in flight no longer, and closing does not wait for one."""
    chat_server.fail("timeout")
    with pytest.raises(openai.APITimeoutError):
        ask(chat_server, body_of())

    ask(chat_server, body_of())

    assert chat_server.max_in_flight == 1


def test_models_are_listed(chat_server: ChatServer) -> None:
    async def names() -> list[str]:
        async with openai.AsyncOpenAI(base_url=chat_server.base_url, api_key="none") as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(names()) == ["gpt-4o-mini", "gpt-4o"]


def test_an_unknown_fault_is_refused(chat_server: ChatServer) -> None:
    with pytest.raises(ValueError, match="expected a fault"):
        chat_server.fail("420")
    assert "reset" in FAULTS


async def _post_all(server: ChatServer, numbers: list[int]) -> list[int]:
    """Post one small question for every number, all at once, and return the statuses."""

    async def post(session: aiohttp.ClientSession, number: int) -> int:
        message = {"role": "user", "content": f"Doc (1): passage {number}"}
        body = {"model": "gpt-4o", "messages": [message]}
        async with session.post(f"{server.base_url}/chat/completions", json=body) as response:
            await response.read()
            return response.status

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(post(session, number) for number in numbers))
