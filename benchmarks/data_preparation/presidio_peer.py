"""Presidio's pattern recognisers on texts; runs in an environment of its own.

    python presidio_peer.py TEXTS.json OUT.json

TEXTS.json is a list of strings; OUT.json gets the spans of each as [start, end, type, score], and
the processor seconds that finding them took. No model of names is loaded.
"""

import json
import sys
import time

from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import NlpEngineProvider
from presidio_analyzer.predefined_recognizers import (
    AuAbnRecognizer,
    AuAcnRecognizer,
    AuMedicareRecognizer,
    AuTfnRecognizer,
    CreditCardRecognizer,
    CryptoRecognizer,
    DateRecognizer,
    EmailRecognizer,
    IbanRecognizer,
    InAadhaarRecognizer,
    IpRecognizer,
    ItFiscalCodeRecognizer,
    MedicalLicenseRecognizer,
    NhsRecognizer,
    PhoneRecognizer,
    SgFinRecognizer,
    UrlRecognizer,
    UsBankRecognizer,
    UsItinRecognizer,
    UsSsnRecognizer,
)

SHARED = (
    CreditCardRecognizer,
    EmailRecognizer,
    IbanRecognizer,
    IpRecognizer,
    PhoneRecognizer,
    UrlRecognizer,
    UsSsnRecognizer,
)
OTHERS = (
    AuAbnRecognizer,
    AuAcnRecognizer,
    AuMedicareRecognizer,
    AuTfnRecognizer,
    CryptoRecognizer,
    DateRecognizer,
    InAadhaarRecognizer,
    ItFiscalCodeRecognizer,
    MedicalLicenseRecognizer,
    NhsRecognizer,
    SgFinRecognizer,
    UsBankRecognizer,
    UsItinRecognizer,
)


def make_analyzer(recognisers):
    """Return an analyzer with these recognisers and no model."""
    configuration = {
        "nlp_engine_name": "no_op",
        "models": [{"lang_code": "en", "model_name": "no_op"}],
    }
    registry = RecognizerRegistry(recognizers=[each() for each in recognisers])
    engine = NlpEngineProvider(nlp_configuration=configuration).create_engine()
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])


def main():
    """Find, time and write."""
    with open(sys.argv[1], encoding="utf-8") as file:
        texts = json.load(file)
    shared, all_of_them = make_analyzer(SHARED), make_analyzer((*SHARED, *OTHERS))
    for analyzer in (shared, all_of_them):
        analyzer.analyze(text="Call 212-555-0143 or write to a@example.org.", language="en")
    spans = [
        [[each.start, each.end, each.entity_type, each.score] for each in found]
        for found in (shared.analyze(text=text, language="en") for text in texts)
    ]
    begin = time.process_time()
    for text in texts:
        all_of_them.analyze(text=text, language="en")
    seconds = time.process_time() - begin
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"spans": spans, "seconds": seconds}, file)


if __name__ == "__main__":
    main()
