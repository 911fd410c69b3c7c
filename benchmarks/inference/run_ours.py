"""Mutirão's engine, opened with the memory limit as its budget.

With ``options.prepare`` it only builds the weight store and the calibration, once.
"""

from __future__ import annotations

from dataclasses import asdict

from recorder import Recorder, read_task

import mutirao
from mutirao.inference.decoding import Counts
from mutirao.inference.engine import Engine


def main() -> None:
    task = read_task()
    engine = Engine.open(
        task["model"],
        memory=task["memory_bytes"],
        threads=task["threads"],
        context=task["context_tokens"],
        speculation=task["options"]["speculation"],
    )
    if task["options"].get("prepare"):
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
