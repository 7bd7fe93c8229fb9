"""ChatJudge: any model behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_relabel.errors import SettingError, UnusableReplyError
from hf_relabel.judges.budget import Budget
from hf_relabel.judges.client import ChatClient, RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.limits import Ceilings, Limiter, shared_limiter
from hf_relabel.judges.models import profile_of
from hf_relabel.judges.protocol import question_key
from hf_relabel.presence import Presence
from hf_relabel.prompts import Prompt, load_prompt
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Verdict

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["ChatJudge"]

_SAME_ANSWER = frozenset({"prompt_cache_key", "prompt_cache_options"})
"""Parameters that change the bill and never the answer: no part of a fingerprint."""

ClientFactory: TypeAlias = "Callable[[], AsyncOpenAI]"


class ChatJudge:
    """Asks a chat model one question a row, and reads its verdicts.

    Pickles as its settings; a key given here stays out of the pickle, so workers take theirs from
    the environment as the openai client does, or from `client`.

    Args:
        model: The model's name, or Azure's deployment name.
        prompt: A shipped prompt's name, a file, a template with slots, or a `Prompt`.
        prompts_by_subset: Other prompts for some subsets, in any case of letters.
        endpoint: Address, headers and time limit; OpenAI's own by default.
        api_key: Kept in this process alone; None leaves it to the openai client.
        client: A picklable function that builds the openai client, for authentication of your own;
            `endpoint` then still names the host for the fingerprint.
        temperature: None leaves the model's own. The paper used 0.1.
        seed: Sent where the model takes one.
        max_completion_tokens: Cap on the reply. A reply that hits it is unusable, not cut.
        max_passages: Most passages a call shows; the paper's prompts show 25.
        parameters: More parameters of the call, as the API names them.
        retry: When a failed call is sent again.
        ceilings: What is allowed at most: calls in flight, requests and tokens a minute. Judges
            that ask the same model on the same host share one limit.
        name: Shown in verdicts and reports; the model's name when None.
        budget: The cap on what its calls cost; None caps nothing.

    Raises:
        PromptError: A prompt cannot be used.
        SettingError: A number is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str | Prompt = "paper-strong",
        prompts_by_subset: Mapping[str, str | Prompt] | None = None,
        endpoint: Endpoint | None = None,
        api_key: str | None = None,
        client: ClientFactory | None = None,
        temperature: float | None = 0.1,
        seed: int | None = None,
        max_completion_tokens: int = 4096,
        max_passages: int = 25,
        parameters: Mapping[str, Any] | None = None,
        retry: RetryRule | None = None,
        ceilings: Ceilings | None = None,
        name: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.model = model
        self.name = name or model
        self.prompt = _as_prompt(prompt)
        self.prompts_by_subset = {
            subset.lower(): _as_prompt(other) for subset, other in (prompts_by_subset or {}).items()
        }
        self.endpoint = endpoint or Endpoint()
        self.max_passages = _at_least_one("max_passages", max_passages)
        self.ceilings = ceilings or Ceilings()
        self.max_completion_tokens = _at_least_one("max_completion_tokens", max_completion_tokens)
        self.temperature = temperature
        self.seed = seed
        self.parameters = dict(parameters or {})
        self.retry = retry or RetryRule()
        self.budget = budget
        self._connect = client
        self._api_key = api_key
        self._prepare()

    def _prepare(self) -> None:
        self._clients: dict[asyncio.AbstractEventLoop, ChatClient] = {}
        self._presence: Presence | None = None
        self._n_sharing = 0
        self._decoding = self._decoding_parameters()
        decoding = {name: v for name, v in self._decoding.items() if name not in _SAME_ANSWER}
        settings = [self.model, self.endpoint.host, self.max_passages, decoding]
        self._settings_json = json.dumps(settings, sort_keys=True)
        self._key_prefixes: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of model, host, decoding and prompts. Neither port nor path: a server may move."""
        prompts = {name: prompt.fingerprint for name, prompt in self.prompts_by_subset.items()}
        parts = [self._settings_json, self.prompt.fingerprint, sorted(prompts.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def key(self, question: Question) -> str:
        prompt = self.prompt_for(question)
        prefix = self._key_prefixes.setdefault(
            prompt.fingerprint, f"{self._settings_json}{prompt.fingerprint}"
        )
        return question_key(prefix, question)

    def prompt_for(self, question: Question) -> Prompt:
        """Return the prompt that asks this question: its subset's own, or the general one."""
        if question.subset is None or not self.prompts_by_subset:
            return self.prompt
        return self.prompts_by_subset.get(question.subset.lower(), self.prompt)

    def body(
        self, question: Question, *, unusable: tuple[Reply, UnusableReplyError] | None = None
    ) -> dict[str, Any]:
        """Return the whole request, as the chat completions API takes it."""
        prompt = self.prompt_for(question)
        if unusable is None:
            messages = prompt.messages(question)
        else:
            messages = prompt.repair(question, *unusable)
        body = {"model": self.model, "messages": messages, **self._decoding}
        if (schema := prompt.response_format(len(question.passages))) is not None:
            body["response_format"] = schema
        return body

    async def ask(
        self, question: Question, *, unusable: tuple[Reply, UnusableReplyError] | None = None
    ) -> Reply:
        return await self._client().complete(self.body(question, unusable=unusable))

    def parse(self, question: Question, reply: Reply) -> list[Verdict]:
        prompt = self.prompt_for(question)
        return prompt.parse(reply, len(question.passages), judge=self.name)

    def parse_briefly(self, question: Question, reply: Reply) -> list[Verdict]:
        prompt, n_passages = self.prompt_for(question), len(question.passages)
        return prompt.parse(reply, n_passages, judge=self.name, has_reasons=False)

    def with_budget(self, budget: Budget) -> ChatJudge:
        """Return a judge that asks alike, and whose calls are under a cap."""
        capped = copy.copy(self)
        capped.budget = budget
        capped._api_key = self._api_key  # a copy is made of what a pickle holds
        return capped

    def attach(self, presence: Presence) -> None:
        """Share the ceilings out among the processes that are present in a cache folder."""
        self._presence = presence

    def stop(self) -> None:
        """Send no call that still waits for its turn."""
        for client in self._clients.values():
            client.stop()

    @property
    def faults(self) -> Counter[str]:
        """How often each fault was met by this process, retried or not."""
        return sum((client.faults for client in self._clients.values()), Counter[str]())

    def connect(self) -> AsyncOpenAI:
        """Build the openai client that this judge asks through."""
        return self._connect() if self._connect else self.endpoint.connect(self._api_key)

    def _client(self) -> ChatClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        n_sharing = 1 if self._presence is None else self._presence.count()
        if client is None or n_sharing != self._n_sharing:
            self._n_sharing = n_sharing
            ceilings = self.ceilings.share(n_sharing)
            limiter = shared_limiter(self.endpoint.host, self.model, ceilings)
            client = client or self._new_client(limiter)
            self._clients[loop] = client
        return client

    def _new_client(self, limiter: Limiter) -> ChatClient:
        return ChatClient(
            self.name,
            self.connect(),
            limiter=limiter,
            retry=self.retry,
            timeout_s=self.endpoint.timeout_s,
            budget=self.budget,
        )

    def _decoding_parameters(self) -> dict[str, Any]:
        profile = profile_of(self.model)
        values = {
            "max_completion_tokens": self.max_completion_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            **profile.add,
            **self.parameters,
        }
        return {
            name: value
            for name, value in values.items()
            if value is not None and (name not in profile.drop or name in self.parameters)
        }

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_api_key", "_clients", "_decoding", "_settings_json", "_key_prefixes"}
        hidden |= {"_presence", "_n_sharing"}
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._api_key = None
        self._prepare()


def _as_prompt(prompt: str | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else load_prompt(prompt)


def _at_least_one(setting: str, value: int) -> int:
    if value < 1:
        raise SettingError(f"expected {setting} of 1 or more, found {value}.")
    return value
