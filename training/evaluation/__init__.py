"""Measuring adapters on held-out pairs: `controlkit evaluate`."""
