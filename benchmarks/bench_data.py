"""The data stage, measured: identifiers so far.

    make bench-data ARGS="--presidio-texts DEV.json"

DEV.json is data/presidio_dataset/dev.json of presidio-research at commit 7622dec (MIT). Writes
docs/benchmarks/data/data.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

from data_preparation import identifiers

from mutirao.artifact import write_atomic

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "data" / "data.json"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presidio-texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = {
        "processor": platform.processor() or platform.machine(),
        "identifiers": identifiers.measure(options.presidio_texts),
    }
    content = json.dumps(found, indent=1)
    write_atomic(options.out, content + "\n")
    print(content)


if __name__ == "__main__":
    main()
