"""Federated training: each site trains on its own data, only updates travel.

    plan, messages, parcel    what is agreed, and the signed parcels that travel
    network                   how the coordinator reaches the sites, whoever carries parcels
    site/                     a site: its gate and policy, its trainer, its journal
    coordinator/              the rounds, their journal, what is measured and unlearned
    aggregation/              how updates become one, tensor by tensor, and what goes together
    codec/                    values in 32 to 2 bits
    secure/                   secure aggregation
    audit/                    the signed log of what left a site
    flower/                   Flower carries parcels over a network; imported nowhere else
    simulation                all sites in turns in one process
    recipe, identity, arrays  a federation's TOML file; keys; small files of arrays

May import inference and everything below.
"""
