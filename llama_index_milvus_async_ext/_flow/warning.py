"""Warnings in the midst of work."""

from __future__ import annotations

import logging
import warnings

_logger = logging.getLogger(__name__)


def warn(message: str) -> None:
    """Warn the user. Where a filter makes an error of that (`-W error`), it is logged: the work is not to end by it."""
    try:
        warnings.warn(message, UserWarning, stacklevel=2)
    except Exception:  # of a hook of the user's, too
        _logger.warning(message)
