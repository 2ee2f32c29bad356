"""The machine that a command runs on: processes, hardware, signals, files, errors. Independent of diffusion."""
