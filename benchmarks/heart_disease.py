"""Tell the records of four real hospitals (UCI Heart Disease, CC BY 4.0) as short texts.

Detrano et al. 1989, American Journal of Cardiology 64:304-310; A. Janosi, W. Steinbrunn,
M. Pfisterer and R. Detrano collected them. The tables are not part of this project: a folder
``heart_disease`` with them is looked for in MUTIRAO_TEST_DATA, or in ``shared/data`` beside
the checkout.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = [
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
]
CHEST_PAIN = {1: "typical angina", 2: "atypical angina", 3: "non-anginal pain", 4: "asymptomatic"}
SLOPE = {1: "upsloping", 2: "flat", 3: "downsloping"}
THALLIUM = {3: "normal", 6: "fixed defect", 7: "reversible defect"}


def data_folder() -> Path:
    """Return the folder of the four tables; it may be missing."""
    base = Path(os.environ.get("MUTIRAO_TEST_DATA", ROOT.parent / "shared" / "data"))
    return base / "heart_disease"


def read_patients(hospital: str) -> list[dict[str, float | None]]:
    """Return a hospital's rows; None where a value is missing."""
    with (data_folder() / f"{hospital}.csv").open(encoding="utf-8") as file:
        return [
            {
                name: None if value.strip() == "?" else float(value)
                for name, value in zip(COLUMNS, row, strict=True)
            }
            for row in csv.reader(file)
            if row
        ]


def tell(patient: dict[str, float | None]) -> str:
    """Return the findings as a sentence; what is missing is not mentioned."""
    parts = [f"{'man' if patient['sex'] else 'woman'}, {patient['age']:.0f} years"]

    def add(name: str, wording: str, table: dict[int, str] | None = None) -> None:
        value = patient[name]
        # A cholesterol or pressure of 0 in these tables stands for a missing one.
        if value is None or (name in ("chol", "trestbps") and value == 0):
            return
        said = table.get(int(value)) if table else f"{value:g}"
        if said is not None:
            parts.append(wording.format(said))

    add("cp", "{}", CHEST_PAIN)
    add("exang", "{} on exertion", {0: "no pain", 1: "pain"})
    add("oldpeak", "ST depression {} mm")
    add("slope", "{} ST segment", SLOPE)
    add("thalach", "maximal pulse {}")
    add("thal", "thallium scan {}", THALLIUM)
    add("ca", "{} narrowed vessels on fluoroscopy")
    add("trestbps", "pressure {}")
    add("chol", "cholesterol {}")
    add("fbs", "{} blood sugar", {0: "normal", 1: "high"})
    return "Patient: " + ", ".join(parts) + ". Heart disease:"


def write_hospital(hospital: str, folder: Path) -> int:
    """Write a hospital's silo folder; return the number of patients."""
    patients = read_patients(hospital)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": tell(patient),
            "choices": [" no", " yes"],
            "answer": int((patient["num"] or 0) > 0),
            "task": "outcome",
        }
        for patient in patients
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "patients.jsonl").write_text(text, encoding="utf-8")
    return len(rows)
