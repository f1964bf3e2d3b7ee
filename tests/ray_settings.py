"""Ray in tests: a cluster of their own, which leaves nothing behind and says nothing."""

from __future__ import annotations


def of_ray(folder: str) -> dict[str, str]:
    """Environment variables for a program that starts Ray, with its files in this folder.

    Ray makes sockets in it, so its path must be short.
    """
    return {
        "RAY_ADDRESS": "local",  # never a cluster that is there already
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",  # else it keeps a token in the user's home, and says so
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its future default, of which it warns
        "RAY_USAGE_STATS_ENABLED": "0",
    }
