"""What the data stage is measured on: notes with known identifiers, perturbed copies, peers."""
