"""The weight store: a model's weights as bit planes in one file, built from what others wrote.

``weight_store`` opens one, ``store_build`` makes it, ``planes`` is its arithmetic. May import
``architecture`` and nothing else of the engine, but for ``text``, whose files it keeps.
"""
