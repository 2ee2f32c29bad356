"""Shares a saved model: its index, its model card, and the upload to the Hugging Face Hub."""
