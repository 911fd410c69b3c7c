"""Readers of a site's own files: each yields records, one at a time."""
