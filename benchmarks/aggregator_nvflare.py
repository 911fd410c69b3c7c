"""NVFlare for the aggregator benchmark, in an environment of its own: its FedAvg, its simulator.

    python benchmarks/aggregator_nvflare.py TASK_FILE

Its simulator runs the server in one process and sites in others, over its real cell network.
Tensors are PyTorch's, float32. With the peer "nvflare-offload" replies wait on the disk
(``enable_tensor_disk_offload``), its way to constant memory. Imports nothing of ours but the
task.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aggregator_task import Task

SITE_WORKER = "simulator_worker"
"""In the command line of the simulator's sites, and of no other process of it."""
OFFLOAD = "nvflare-offload"
MAX_SITES_AT_ONCE = 8
"""Processes of sites; more sites take turns in them."""


def main(path: str) -> None:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat
    from nvflare.recipe.sim_env import SimEnv

    task = Task.read(path)
    recipe = FedAvgRecipe(
        name="aggregator",
        model={"class_path": "aggregator_nvflare_model.Model", "args": {"size": task.size}},
        min_clients=task.num_sites,
        num_rounds=task.num_rounds,
        train_script=str(Path(__file__).with_name("aggregator_nvflare_site.py")),
        train_args=path,
        server_expected_format=ExchangeFormat.PYTORCH,
        enable_tensor_disk_offload=task.peer == OFFLOAD,
    )
    environment = SimEnv(
        clients=task.sites,
        num_threads=min(task.num_sites, MAX_SITES_AT_ONCE),
        workspace_root=str(Path(task.folder) / "nvflare"),
    )
    recipe.execute(environment)


if __name__ == "__main__":
    main(sys.argv[1])
