"""What every test stands on: no network, no key, folders of its own, and a chat server on loopback.

The environment is set while this file is imported, before any test can import a library that
reads it only once (`datasets` and `huggingface_hub` do).
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import ChatServer
from tests.hub.double import HubDouble

ROOT = Path(__file__).resolve().parent.parent
_HOME = Path(tempfile.mkdtemp(prefix="hf-relabel-home-"))
_CLI = "import sys; from hf_relabel.cli import main; sys.exit(main())"


def _isolate_environment() -> None:
    """Point every home and cache into a folder that is ours, and forget keys and proxies."""
    unwanted = ("OPENAI_", "AZURE_", "ANTHROPIC_", "HF_", "HUGGING")
    for name in list(os.environ):
        if name.startswith(unwanted) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(
        HOME=str(_HOME),
        XDG_CACHE_HOME=str(_HOME / ".cache"),
        XDG_CONFIG_HOME=str(_HOME / ".config"),
        XDG_DATA_HOME=str(_HOME / ".local/share"),
        HF_HOME=str(_HOME / "huggingface"),
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        # Two OpenMP threads on two busy cores spin at every barrier, and lose a factor of 30.
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="passive",
        MPLBACKEND="agg",
        NO_COLOR="1",
        COLUMNS="100",
    )


_isolate_environment()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)


class NetworkBlockedError(RuntimeError):
    """A test went for the network. Not an OSError, which clients would retry or hide."""


class _Guard:
    """Replaces the socket functions that reach out; loopback and local sockets pass."""

    def __init__(self) -> None:
        self.is_open = False
        self._connect = socket.socket.connect
        self._connect_ex = socket.socket.connect_ex
        self._getaddrinfo = socket.getaddrinfo

    def install(self) -> None:
        guard = self

        def connect(self: socket.socket, address: Any) -> None:
            guard.check(address)
            guard._connect(self, address)

        def connect_ex(self: socket.socket, address: Any) -> int:
            guard.check(address)
            return guard._connect_ex(self, address)

        def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
            guard.check((host,))
            return guard._getaddrinfo(host, *args, **kwargs)

        socket.socket.connect = connect  # type: ignore[method-assign,assignment]
        socket.socket.connect_ex = connect_ex  # type: ignore[method-assign,assignment]
        socket.getaddrinfo = getaddrinfo

    def check(self, address: Any) -> None:
        if self.is_open or not isinstance(address, tuple) or _is_loopback(address[0]):
            return
        raise NetworkBlockedError(
            f"a test tried to reach {address[0]!r}; mark it `network` if it must"
        )


def _is_loopback(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False


# From the start, not only inside tests: collection and a session's fixtures are held to it too.
GUARD = _Guard()
GUARD.install()


@pytest.fixture(autouse=True)
def closed_sockets(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep sockets to the loopback, unless the test is marked `network`."""
    GUARD.install()  # again: a plugin that some have installed puts the originals back
    GUARD.is_open = request.node.get_closest_marker("network") is not None
    yield
    GUARD.is_open = False


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back what a test leaves in the environment.

    monkeypatch does, but for one case: `map` with workers puts a copy in the place of os.environ.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """Serve a chat API on loopback; set `answer`, `latency_s` and `fail(...)` in the test."""
    with ChatServer() as server:
        yield server


@pytest.fixture
def key_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a key as a user does, for this process and for workers of `map`."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")


@pytest.fixture
def subprocess_env() -> Callable[..., dict[str, str]]:
    """Build an environment for a subprocess: the tests' own, in which hf_relabel is importable.

    Keyword arguments are set on top of it (`HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url`); None
    removes a name. Sockets are not guarded there.
    """

    def build(**changes: str | None) -> dict[str, str]:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1"}
        for name, value in changes.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    return build


@pytest.fixture
def run_cli(
    tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hf-relabel ARGS…` as a process of its own, in the test's folder.

    Keyword arguments go into its environment. The exit status is the caller's to check.
    """

    def run(
        *args: str | Path, timeout_s: float = 120, cwd: Path = tmp_path, **env: str | None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _CLI, *map(str, args)],
            cwd=cwd,
            env=subprocess_env(**env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """Serve a double of the Hub on loopback."""
    with HubDouble() as double:
        yield double


@pytest.fixture
def on_hub(hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubDouble:
    """Point the Hub clients of this process at the double, online, over LFS, as the user `me`.

    The clients read these settings when they are imported, but look them up at each call.
    """
    import datasets.config
    from huggingface_hub import constants

    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    return hub


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a small cross-encoder on `lit_rows`, once, and return its folder."""
    from tests.cross_encoders import train_cross_encoder

    return train_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))
