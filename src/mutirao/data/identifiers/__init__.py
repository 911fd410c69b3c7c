"""Identifiers of people: what they look like, where they stand, what is put in their place."""
