"""Run a model: text out of a prompt, on the machine at hand."""
