"""Measure a model on held-out records; models are seen only through ``LanguageModel``."""
