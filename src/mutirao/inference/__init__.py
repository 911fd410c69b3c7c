"""Run a model: text out of a prompt, on the machine at hand.

Through transformers for now, with the whole model in memory. May import compress and
everything below.
"""

from mutirao.inference.generate import Chat, Generation, TextGenerator
from mutirao.inference.model_source import resolve_model

__all__ = ["Chat", "Generation", "TextGenerator", "resolve_model"]
