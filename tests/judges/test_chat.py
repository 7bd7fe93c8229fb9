"""ChatJudge: what it sends, what it is, and what it never tells."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from openai import AsyncOpenAI

from hf_relabel import background
from hf_relabel.errors import AccountError, JudgeError, PromptError, SettingError
from hf_relabel.errors import UnusableReplyError as Unusable
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.limits import Ceilings
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance
from tests.chat_server import ChatServer, from_key, passages_shown, prompt_of
from tests.judges.raw_server import RawServer

KEY = "sk-test-0123456789abcdef"
QUICK = RetryRule(max_attempts=2, first_wait_s=0.001, max_wait_s=0.002)
QUESTION = Question(
    query="capital of France",
    passages=("Paris is the capital.", "Cats sleep.", "Lyon was a capital."),
    positives=("The capital of France is Paris.",),
)
TRUTH = {
    (QUESTION.query, QUESTION.passages[0]): "better",
    (QUESTION.query, QUESTION.passages[2]): "worse",
}
WAIT_S = 30


def judge_at(base_url: str, model: str = "m", **settings: Any) -> ChatJudge:
    settings = {"api_key": KEY, "retry": QUICK, **settings}
    return ChatJudge(model, endpoint=Endpoint(base_url=base_url), **settings)


def ask(judge: ChatJudge, question: Question = QUESTION, **how: Any) -> Reply:
    return background.run(asyncio.wait_for(judge.ask(question, **how), WAIT_S))


@pytest.fixture
def server(chat_server: ChatServer) -> ChatServer:
    chat_server.answer = from_key(TRUTH)
    return chat_server


# Asking


@pytest.mark.parametrize("prompt", ["paper-cheap", "paper-strong", "paper-title", "graded"])
def test_a_judge_asks_and_reads_the_verdicts(server: ChatServer, prompt: str) -> None:
    judge = judge_at(server.base_url, prompt=prompt, name="strong")

    verdicts = judge.parse(QUESTION, ask(judge))

    assert [verdict.relevance for verdict in verdicts] == [
        Relevance.BETTER,
        Relevance.NOT_RELEVANT,
        Relevance.WORSE,
    ]
    assert {verdict.judge for verdict in verdicts} == {"strong"}
    shown = passages_shown(server.seen[0].prompt)
    assert tuple(shown.values()) == QUESTION.passages


def test_the_body_is_what_the_settings_say(server: ChatServer) -> None:
    judge = judge_at(
        server.base_url,
        temperature=0.3,
        seed=7,
        max_completion_tokens=99,
        parameters={"top_p": 0.5, "logprobs": True},
    )

    ask(judge)

    body = dict(server.seen[0].body)
    messages = body.pop("messages")
    assert body == {
        "model": "m",
        "temperature": 0.3,
        "seed": 7,
        "max_completion_tokens": 99,
        "top_p": 0.5,
        "logprobs": True,
    }
    assert messages == judge.body(QUESTION)["messages"]


def test_a_strict_schema_goes_along_with_the_json_protocol(server: ChatServer) -> None:
    ask(judge_at(server.base_url, prompt="graded"))

    wanted = server.seen[0].body["response_format"]["json_schema"]
    assert wanted["strict"] is True
    assert len(wanted["schema"]["properties"]) == len(QUESTION.passages)


def test_a_reasoning_model_gets_an_effort_and_no_temperature() -> None:
    body = ChatJudge("gpt-5-mini", seed=3).body(QUESTION)

    assert not {"temperature", "seed"} & set(body)
    assert body["reasoning_effort"] == "low"


def test_a_callers_own_parameters_go_before_the_profile() -> None:
    parameters = {"reasoning_effort": "high", "temperature": 1}

    body = ChatJudge("gpt-5-mini", parameters=parameters).body(QUESTION)

    assert (body["reasoning_effort"], body["temperature"]) == ("high", 1)


def test_none_leaves_the_models_own_temperature() -> None:
    assert "temperature" not in ChatJudge("m", temperature=None).body(QUESTION)
    assert ChatJudge("m", temperature=0.0).body(QUESTION)["temperature"] == 0.0


def test_a_repair_question_repeats_the_question_and_what_was_wrong(server: ChatServer) -> None:
    judge = judge_at(server.base_url)
    unusable = Reply(text="I think Doc (1) is fine."), Unusable("no verdict", reason="no_verdict")

    reply = ask(judge, unusable=unusable)

    seen = server.seen[0]
    assert QUESTION.query in seen.prompt
    said = [m["content"] for m in seen.body["messages"] if m["role"] == "assistant"]
    assert said == ["I think Doc (1) is fine."]
    assert judge.parse(QUESTION, reply)[0].relevance is Relevance.BETTER


@pytest.mark.parametrize(
    ("subset", "prompt"),
    [
        ("scidocsrr", "paper-title"),
        ("SciDocsRR", "paper-title"),
        ("fiqa", "paper-cheap"),
        (None, "paper-cheap"),
    ],
)
def test_a_subset_chooses_its_prompt(server: ChatServer, subset: str | None, prompt: str) -> None:
    prompts = {"SCIDOCSRR": "paper-title"}
    judge = judge_at(server.base_url, prompt="paper-cheap", prompts_by_subset=prompts)
    question = Question(query=QUESTION.query, passages=QUESTION.passages, subset=subset)

    ask(judge, question)

    expected = {"messages": ChatJudge("m", prompt=prompt).body(question)["messages"]}
    assert server.seen[0].prompt == prompt_of(expected)


def test_a_judge_works_on_one_loop_after_another(server: ChatServer) -> None:
    """A client belongs to the loop that it was built on; a judge to none."""
    judge = judge_at(server.base_url)

    async def ask_and_close() -> Reply:
        reply = await judge.ask(QUESTION)
        # asyncio.run closes its loop, on which nothing can be closed later.
        await judge._client()._transport.close()
        return reply

    replies = [ask(judge), asyncio.run(ask_and_close()), ask(judge)]

    assert [type(reply) for reply in replies] == [Reply] * 3


def test_a_client_of_the_users_own_is_used(server: ChatServer) -> None:
    judge = ChatJudge(
        "m",
        client=_Connect(server.base_url),
        endpoint=Endpoint(base_url="https://gateway.example/v1"),
        retry=QUICK,
    )
    copy = pickle.loads(pickle.dumps(judge))  # noqa: S301

    for each in (judge, copy):
        ask(each)

    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer own-key"] * 2


class _Connect:
    """Builds a client with authentication of its own; picklable, as the setting asks."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def __call__(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.base_url, api_key="own-key", max_retries=0)


# Fingerprints and keys

BASE: dict[str, Any] = {"endpoint": Endpoint(base_url="http://one.example:1/v1")}
CHANGES_AN_ANSWER: list[dict[str, Any]] = [
    {"model": "other"},
    {"endpoint": Endpoint(base_url="http://two.example:1/v1")},
    {"prompt": "paper-cheap"},
    {"prompt": "graded"},
    {"temperature": 0.2},
    {"temperature": None},
    {"seed": 1},
    {"max_completion_tokens": 10},
    {"max_passages": 10},
    {"parameters": {"top_p": 0.5}},
    {"prompts_by_subset": {"scidocsrr": "paper-title"}},
]
CHANGES_NO_ANSWER: list[dict[str, Any]] = [
    {"endpoint": Endpoint(base_url="http://one.example:2/v1")},
    {"endpoint": Endpoint(base_url="https://one.example/proxy/v1")},
    {"endpoint": Endpoint(base_url="http://one.example:1/v1", timeout_s=1)},
    {"endpoint": Endpoint(base_url="http://one.example:1/v1", headers=(("X-Team", "a"),))},
    {"endpoint": Endpoint(base_url="http://one.example:1/v1", organization="org")},
    {"api_key": KEY},
    {"ceilings": Ceilings(max_concurrency=1)},
    {"retry": RetryRule(max_attempts=1)},
    {"name": "strong"},
]


def fingerprints(changes: dict[str, Any], question: Question) -> tuple[str, str]:
    judge = ChatJudge(**{"model": "m", **BASE, **changes})
    return judge.fingerprint, judge.key(question)


@pytest.mark.parametrize("changes", CHANGES_AN_ANSWER, ids=str)
def test_what_could_change_an_answer_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    question = Question(query="q", passages=("a",), subset="scidocsrr")

    before, after = fingerprints({}, question), fingerprints(changes, question)

    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("changes", CHANGES_NO_ANSWER, ids=lambda c: next(iter(c)))
def test_what_cannot_change_an_answer_does_not_change_the_fingerprint(
    changes: dict[str, Any],
) -> None:
    """A server that moves, or a key that rotates, must not throw away what was paid for."""
    assert fingerprints({}, QUESTION) == fingerprints(changes, QUESTION)


def test_a_prompt_for_another_subset_does_not_change_this_ones_key() -> None:
    """Only its own prompt was shown."""
    question = Question(query="q", passages=("a",), subset="fiqa")

    with_other = fingerprints({"prompts_by_subset": {"scidocsrr": "paper-title"}}, question)

    assert with_other[1] == fingerprints({}, question)[1]


def test_a_judges_copy_has_its_fingerprint_after_a_run_too(server: ChatServer) -> None:
    judge = judge_at(server.base_url)
    before = pickle.dumps(judge)
    ask(judge)

    assert pickle.dumps(judge) == before
    copy = pickle.loads(before)  # noqa: S301
    assert (copy.fingerprint, copy.key(QUESTION)) == (judge.fingerprint, judge.key(QUESTION))
    assert copy.body(QUESTION) == judge.body(QUESTION)


# Secrets


def test_a_key_is_sent_and_shows_nowhere_else(server: ChatServer) -> None:
    judge = judge_at(server.base_url)
    reply = ask(judge)

    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    shown = [repr(judge), str(judge), repr(judge.endpoint), repr(reply), judge.fingerprint]
    assert KEY not in "".join([*shown, str(judge.body(QUESTION))])
    assert KEY.encode() not in pickle.dumps(judge)


def test_a_copy_in_a_worker_takes_its_key_from_the_environment(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pickle.loads(pickle.dumps(judge_at(server.base_url)))  # noqa: S301
    with pytest.raises(AccountError, match="Set OPENAI_API_KEY"):
        ask(copy)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-worker-1234")
    ask(copy)

    assert server.seen[0].headers["authorization"] == "Bearer sk-of-the-worker-1234"


def test_a_server_that_repeats_the_key_cannot_make_an_error_tell_it() -> None:
    body = f'{{"error": {{"message": "Incorrect API key provided: {KEY}.", "code": "x"}}}}'
    with (
        RawServer([(401, body)]) as raw,
        pytest.raises(AccountError, match=r"Incorrect API key provided: \*\*\*") as found,
    ):
        ask(judge_at(f"{raw.address}/v1"))

    assert KEY.encode() not in pickle.dumps(found.value)


def test_errors_name_the_judge(server: ChatServer) -> None:
    server.fail("content_filter")

    with pytest.raises(JudgeError, match="judge 'strong': HTTP 400: The prompt was filtered"):
        ask(judge_at(server.base_url, name="strong"))


# Settings


@pytest.mark.parametrize("setting", ["max_passages", "max_completion_tokens"])
def test_numbers_below_one_are_refused(setting: str) -> None:
    with pytest.raises(SettingError, match=f"expected {setting} of 1 or more, found 0"):
        ChatJudge("m", **{setting: 0})  # type: ignore[arg-type]


def test_prompts_that_cannot_work_are_refused_when_the_judge_is_built() -> None:
    with pytest.raises(PromptError, match="no-such-prompt"):
        ChatJudge("m", prompt="no-such-prompt")
    with pytest.raises(PromptError, match="no-such-prompt"):
        ChatJudge("m", prompts_by_subset={"a": "no-such-prompt"})
