"""What is kept for each event loop."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakKeyDictionary


def forget_closed(of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """Forget the loops that are closed: what is kept for one may refer to it, which no weak key helps against.

    Other threads may do the same meanwhile, or add their loops.
    """
    for reference in of_loops.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            of_loops.pop(loop, None)
