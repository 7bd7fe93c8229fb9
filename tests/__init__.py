"""Tests: a package, so that helpers are imported by name, as in `tests.chat_server`."""
