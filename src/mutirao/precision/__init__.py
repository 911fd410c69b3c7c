"""The precision law, the cost of a model's life, and their calibration; plain mathematics."""
