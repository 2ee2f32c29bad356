"""The judgement of trained models."""
