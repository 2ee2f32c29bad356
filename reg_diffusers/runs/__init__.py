"""The output folder of a run: its files, its lock and its checkpoints."""
