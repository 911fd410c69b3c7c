"""Fewer weights: pruned ones, low-rank products, and layers that share."""
