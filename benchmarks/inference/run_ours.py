"""Mutirão's engine, opened with the memory limit as its budget.

With ``options.prepare`` it only builds the weight store and the calibration, once.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from recorder import Recorder, read_task

import mutirao
from mutirao.inference.decoding import Counts
from mutirao.inference.engine import Engine

LITTLE_MORE_BYTES = 250_000_000


def main() -> None:
    task = read_task()
    is_preparing = bool(task["options"].get("prepare"))
    # With all weights in memory nothing would be calibrated.
    model = Path(task["model"])
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    little = sum(file.stat().st_size for file in files) // 2 + LITTLE_MORE_BYTES
    engine = Engine.open(
        task["model"],
        memory=little if is_preparing else task["memory_bytes"],
        threads=task["threads"],
        context=task["context_tokens"],
        speculation=task["options"]["speculation"],
    )
    if is_preparing:
        return
    recorder = Recorder(task)
    counts = Counts()
    for prompt in task["prompts"]:
        recorder.record(
            engine.generate_tokens(prompt, max_new_tokens=task["max_tokens"], counts=counts)
        )
    recorder.print({"mutirao": mutirao.__version__}, **engine.statistics(), counts=asdict(counts))


if __name__ == "__main__":
    main()
