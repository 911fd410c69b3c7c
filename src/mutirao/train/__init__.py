"""Training loops on one device: batches of examples in, changed parameters out.

May import evaluate, data, models and everything below; knows nothing of adapters,
federations or files of recipes. Parallel training is not here yet.
"""
