"""Weights on grids of few bits: where the grid lies, and which of its points a weight goes to."""
