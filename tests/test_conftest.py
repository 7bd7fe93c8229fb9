"""The fences around the tests hold."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.chat_server import ChatServer
from tests.conftest import GUARD, NetworkBlockedError

# Set aside for documentation (RFC 5737): no one is there, should the guard fail.
NOWHERE = "192.0.2.1"


def test_no_socket_leaves_the_machine() -> None:
    """Refused before any packet. Even without the guard, none of these calls would send one."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        with pytest.raises(NetworkBlockedError, match=NOWHERE):
            sock.connect((NOWHERE, 443))
        with pytest.raises(NetworkBlockedError, match=NOWHERE):
            sock.connect_ex((NOWHERE, 443))
    with pytest.raises(NetworkBlockedError, match=NOWHERE):
        socket.getaddrinfo(NOWHERE, 443)
    with pytest.raises(NetworkBlockedError, match=r"example\.org"):
        GUARD.check(("example.org", 443))


def test_loopback_stays_open(chat_server: ChatServer) -> None:
    with socket.create_connection(("localhost", chat_server.port), timeout=5):
        pass


@pytest.mark.network
def test_a_marked_test_is_not_guarded() -> None:
    """Resolving a literal address asks no server, so that even this test sends nothing."""
    assert socket.getaddrinfo(NOWHERE, 443, type=socket.SOCK_STREAM)


def test_caches_and_home_are_temporary() -> None:
    """Nothing that a test stores lands in the developer's own caches, and no key is inherited."""
    import huggingface_hub.constants as hub

    assert Path.home() == Path(os.environ["HOME"])
    assert "hf-relabel-home-" in str(Path.home())
    assert Path(hub.HF_HOME).is_relative_to(Path.home())
    assert hub.HF_HUB_OFFLINE
    assert not [name for name in os.environ if name.startswith("OPENAI_")]
