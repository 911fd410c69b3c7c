"""Compression that trains: a smaller student, and weights that learn to be rounded."""
