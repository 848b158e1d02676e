"""Evaluation: generate and judge replies; accuracy, no-answer ratio, intervals, paired comparisons, results files."""
