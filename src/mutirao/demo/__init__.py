"""The whole road on embedded data: silos, federation, compression, an answer and a report.

Nothing here is needed to run the road on other folders of text; ``silos`` and ``patients``
only write the raw text that the demonstration starts from.
"""
