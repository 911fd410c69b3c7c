"""Model files of the ecosystem: GGUF in, Hugging Face directories in and out.

``gguf`` checks and converts GGUF files; ``huggingface`` checks, loads and saves model
directories. A file is looked at before a framework is imported, so that a damaged one ends
in one sentence within a second. Nothing here runs a model.
"""
