"""Model files of the ecosystem: GGUF and Hugging Face directories, in and out.

``gguf`` checks and converts GGUF files, ``gguf_plan`` and ``gguf_writer`` make them;
``huggingface`` checks, loads and saves model directories. A file is looked at before a framework
is imported, so that a damaged one ends in one sentence within a second. Nothing here runs a model.
"""
