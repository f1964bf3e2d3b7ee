"""Code that is not ours, such as a model's or a node's own: what it raises is an error of the work that called it."""

from __future__ import annotations

import traceback


def as_error(raised: BaseException, whose: str) -> Exception:
    """What was raised, as an error that can be handed to whoever waits.

    Not everything can: a `CancelledError` would be taken for a cancellation of the one who waits, no future holds a
    `StopIteration`, and what is no `Exception`, such as the panic of a library in Rust, passes those who deal with it.

    Args:
        raised: What was raised.
        whose: What raised it, for the message of another error that stands for it.
    """
    if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
        return raised
    # Not `str`, which may be the user's own and raise in its turn.
    said = "".join(traceback.format_exception_only(type(raised), raised)).strip()
    error = RuntimeError(f"{whose} raised {said}")
    error.__cause__ = raised
    return error
