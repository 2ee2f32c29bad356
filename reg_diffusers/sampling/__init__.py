"""Sampling: the parts of the pipeline, and large numbers of samples."""
