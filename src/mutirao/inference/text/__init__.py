"""Text to tokens and back, and messages to text, from a model's own files, without transformers."""
