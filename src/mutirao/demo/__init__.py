"""The whole road on embedded data: silos, federation, compression, an answer and a report.

``road`` tells it, ``runner`` runs it. Nothing here is needed to go the road on other
folders of text; ``silos`` and ``patients`` only write the raw text that the demonstration
starts from. May import everything but the command line.
"""

from mutirao.demo.recipe import DemoRecipe
from mutirao.demo.runner import run_demo

__all__ = ["DemoRecipe", "run_demo"]
