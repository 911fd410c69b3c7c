"""What a model is: families read from GGUF or config.json, as one specification and a program."""
