"""Make a model smaller and say truly how small: one file per method."""
