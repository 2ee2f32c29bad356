"""Checks that a training loop passes what the noise scheduler expects, and names the likely mistake if not."""
