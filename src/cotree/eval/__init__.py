"""Accuracy with no-answer ratio: samplers and metrics."""
