"""Adapter files: what they are, and how their keys and tensors map."""
