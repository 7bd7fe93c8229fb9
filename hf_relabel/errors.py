"""Errors: every exception that the library raises on purpose, as one tree.

Each says what was expected, what was found, and what to do now. Each also derives from the builtin
that it refines, so that `except ValueError` keeps working.
"""

from __future__ import annotations

__all__ = [
    "AccountError",
    "BudgetError",
    "CacheError",
    "CheckError",
    "ColumnError",
    "HubError",
    "JudgeError",
    "MissingExtraError",
    "PromptError",
    "RelabelError",
    "RowError",
    "SettingError",
    "SourceError",
    "StoppedError",
    "UnusableReplyError",
]


class RelabelError(Exception):
    """The root of every error raised on purpose."""


class SettingError(RelabelError, ValueError):
    """A setting has a value that cannot work; raised when the object is built."""


class PromptError(SettingError):
    """A prompt template cannot be used: a slot is missing, unknown, or the file is not there."""


class ColumnError(RelabelError, ValueError):
    """A dataset's columns fit no known format, or not the one asked for."""


class RowError(RelabelError, ValueError):
    """A row holds a value that its format does not allow; names the column and the row."""


class SourceError(RelabelError, OSError):
    """A file, folder or Hub dataset cannot be read or written as asked."""


class JudgeError(RelabelError, RuntimeError):
    """A judge gave no answer on one question; that row's passages end undecided.

    Attributes:
        reason: A short name of the fault, as counted in reports: "timeout", "content_filter", …
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # An exception with a keyword-only argument does not survive a worker process without this.
        return (_rebuild, (type(self), self.args[0], self.reason))


class AccountError(JudgeError):
    """No later question can succeed either (key, permission, quota, model): the run stops."""


class BudgetError(AccountError):
    """The cap on the cost leaves too little for the next call: the run stops."""


class StoppedError(RelabelError, RuntimeError):
    """Work was left undone; what is done is on disk, and the same command or call goes on."""


class UnusableReplyError(RelabelError, ValueError):
    """A reply holds no verdict for some passage: never read as "not relevant".

    Attributes:
        reason: A short name of the fault, as counted in reports: "truncated", "no_verdict", …
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args[0], self.reason))


class CacheError(RelabelError, OSError):
    """The verdict cache cannot be read or written; what it holds is left alone."""


class CheckError(RelabelError, ValueError):
    """A built folder is not fit to be published; every fault is named, and nothing was sent."""


class HubError(RelabelError, OSError):
    """The Hub refused, or did not answer; what is there already stays whole.

    Attributes:
        reason: "denied" (token or rights), "missing", "conflict", "unavailable" or "foreign".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class MissingExtraError(RelabelError, ImportError):
    """A part needs a package that is not installed; the message names the extra that brings it."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """Build the error for one missing package.

        Args:
            package: The import name that failed.
            extra: The extra of hf-relabel that installs it.
            purpose: What needs it, as the start of the sentence.
        """
        return cls(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'hf-relabel[{extra}]'"
        )


def _rebuild(kind: type[JudgeError | UnusableReplyError], message: str, reason: str) -> Exception:
    return kind(message, reason=reason)
