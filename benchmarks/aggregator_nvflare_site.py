"""A site of NVFlare's: receives a model, sends made-up tensors at once."""

from __future__ import annotations

import sys

import nvflare.client as flare
import torch
from aggregator_task import Task, make_update, note_answer


def main(path: str) -> None:
    task = Task.read(path)
    flare.init()
    name = flare.get_site_name()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        number = int(received.current_round) + 1
        down = sum(each.numel() * each.element_size() for each in received.params.values())
        del received
        update = make_update(task, name, number)
        params = {key: torch.from_numpy(values) for key, values in update.items()}
        up = sum(values.nbytes for values in update.values())
        note_answer(task.folder, name, number, down=down, up=up)
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main(sys.argv[1])
