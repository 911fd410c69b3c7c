"""AirLLM: one layer in memory at a time, the next one being read.

With ``options.prepare`` it only cuts the model into one file per layer, which it does once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys

import torch
from greedy import greedy_tokens
from recorder import Recorder, read_task


def main() -> None:
    task = read_task()
    options = task["options"]
    torch.set_num_threads(task["threads"])
    with contextlib.redirect_stdout(sys.stderr):  # it reports on standard output
        from airllm import AutoModel

        model = AutoModel.from_pretrained(
            task["model"], device="cpu", layer_shards_saving_path=options["folder"]
        )
    if options.get("prepare"):
        return
    recorder = Recorder(task)
    for prompt in task["prompts"]:
        recorder.record(greedy_tokens(model, prompt))
    names = ("airllm", "accelerate", "transformers", "torch")
    recorder.print({name: importlib.metadata.version(name) for name in names})


if __name__ == "__main__":
    main()
