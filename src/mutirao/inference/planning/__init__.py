"""What stays in memory and how fast that will be: placement, cost model, probe, plans."""
