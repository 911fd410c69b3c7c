"""AUROC per hospital before and after federation, on four real hospitals.

Each hospital's records are told as text and stay in its own silo; the base model, each
hospital's own model and the federated one predict who has heart disease. Writes
docs/benchmarks/outcome.json and prints a table.

    make bench-outcome
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from heart_disease import HOSPITALS, ROOT, data_folder, write_hospital

from mutirao.config import load_recipe
from mutirao.demo import DemoRecipe, run_demo
from mutirao.environment import runs_directory, silence
from mutirao.evaluate.evaluation import read_evaluation

SETTINGS = (
    "data.heldout_share=0.3",
    "federated.monitor_tokens=0",
    "evaluation.num_questions=0",
    "evaluation.num_outcomes=150",
    "train.max_tokens_per_example=192",
    'question="A patient has chest pain on exertion. What should be examined?"',
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=runs_directory() / "bench-outcome")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/outcome.json")
    arguments = parser.parse_args()
    if not data_folder().is_dir():
        print(f"{data_folder()} is not there; name its parent in MUTIRAO_TEST_DATA")
        return 2
    silence()
    silos = arguments.run.parent / f"{arguments.run.name}-silos"
    patients = {name: write_hospital(name, silos / name) for name in HOSPITALS}
    folders = ", ".join(f'{name} = "{silos / name}"' for name in HOSPITALS)
    overrides = [f"silos={{{folders}}}", *SETTINGS, *arguments.overrides]
    started = time.monotonic()
    run_demo(load_recipe(DemoRecipe, overrides=overrides), arguments.run)
    result = {
        "command": "make bench-outcome",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {platform.python_version()}",
        "settings": overrides[1:],
        "seconds": round(time.monotonic() - started, 1),
        "hospitals": {},
    }
    base = read_evaluation(arguments.run / "evaluation" / "base")
    federated = read_evaluation(arguments.run / "evaluation" / "federated")
    for name in HOSPITALS:
        rows = {}
        for label, evaluation in (("base", base), ("federated", federated)):
            outcome = evaluation.silos[name].outcomes
            keep = {"num", "num_positive", "auroc", "auroc_low", "auroc_high"}
            rows[label] = outcome.model_dump(include=keep) if outcome else None
        result["hospitals"][name] = {"patients": patients[name], **rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
