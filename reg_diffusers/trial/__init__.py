"""Tries each loss on real images before the first step, and reports errors within a second."""
