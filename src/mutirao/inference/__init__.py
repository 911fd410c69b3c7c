"""Run a model: text out of a prompt, on the machine at hand, in less memory than the model.

``engine.Engine`` is the way in; ``generate.TextGenerator`` runs through transformers what the
engine does not know. Names are imported when they are first used, so that the engine's path
loads neither PyTorch nor transformers. May import compress and everything below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutirao.inference.conversation import Chat, Generation
    from mutirao.inference.engine import Engine
    from mutirao.inference.generate import TextGenerator
    from mutirao.inference.model_source import open_model

__all__ = ["Chat", "Engine", "Generation", "TextGenerator", "open_model"]

_HOMES = {
    "Chat": "conversation",
    "Engine": "engine",
    "Generation": "conversation",
    "TextGenerator": "generate",
    "open_model": "model_source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
