"""Where Mutirão keeps things, and the silence it imposes on itself and its children.

Everything lives under ``MUTIRAO_HOME`` (default: the user's data directory). Telemetry,
update checks and hub look-ups of the libraries we stand on are switched off before any of
them is imported, here and in every child process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
from pathlib import Path

QUIET_VARIABLES = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Set in this process and inherited by its children; the user's own values win, except
where they would switch telemetry on."""

OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Nothing reaches a hub unless a source says ``hf:``; ``sources`` lifts this for its call."""

CHATTY_LOGGERS = ("torchao", "torch.utils._pytree")
"""They warn of GPU libraries and of types of their own whenever a model is loaded where torchao is
installed."""


def home_directory() -> Path:
    """Return MUTIRAO_HOME, or the platform's data directory for Mutirão; not created here."""
    if configured := os.environ.get("MUTIRAO_HOME"):
        return Path(configured).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mutirao"
    data_home = os.environ.get("XDG_DATA_HOME")
    return (Path(data_home) if data_home else Path.home() / ".local" / "share") / "mutirao"


def cache_directory() -> Path:
    """Return the folder of downloads, which can be deleted at any time."""
    return home_directory() / "cache"


def runs_directory() -> Path:
    """Return the folder where runs are kept unless ``--out`` names another."""
    return home_directory() / "runs"


def silence() -> None:
    """Switch off telemetry, update checks and hub access for this process and its children."""
    for name, value in QUIET_VARIABLES.items():
        if name.startswith(("FLWR_", "DO_NOT", "HF_HUB_DISABLE_TEL", "RAY_")):
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    for name, value in OFFLINE_VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment for a child process: ours, silenced, with ``extra`` on top."""
    silence()
    return {**os.environ, **extra}


def release_memory() -> None:
    """Give the memory that nothing uses any more back to the system, which malloc does not do.

    Only with the GNU C library; elsewhere garbage is collected and no more.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
