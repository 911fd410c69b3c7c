"""What fewer bits cost, shown to people: an advice, and compressed models side by side.

    document    reads an advice from its ``advice.json``
    models      reads what compressed models' manifests say of them
    rises       axes, labels and words for rises of the loss
    charts      figures of an advice
    page        the page of an advice, and its numbers in the terminal
    side_by_side  the page of compressed models, and their numbers in the terminal

Both pages are made from files alone; no model is loaded and nothing is measured.
"""

from mutirao.report.advice.document import AdviceDocument, is_advice, read_advice
from mutirao.report.advice.models import CompressedModel, is_model, read_models
from mutirao.report.advice.page import advice_json, print_advice, write_advice_report
from mutirao.report.advice.side_by_side import print_models, write_models_report

__all__ = [
    "AdviceDocument",
    "CompressedModel",
    "advice_json",
    "is_advice",
    "is_model",
    "print_advice",
    "print_models",
    "read_advice",
    "read_models",
    "write_advice_report",
    "write_models_report",
]
