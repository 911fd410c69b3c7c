"""Mutirão: train one language model across organisations that may not pool their data.

The tree is the architecture; each package's docstring says what it holds. Nothing heavy
is imported here, so that ``import mutirao`` and ``mutirao --help`` stay instant.
"""

__version__ = "0.1.0"
