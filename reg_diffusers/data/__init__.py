"""Training data: turns user files into batches of (B, C, H, W) with the conditions of each image."""
