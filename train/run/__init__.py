"""A training run: loop, engine, checkpoints, log."""
