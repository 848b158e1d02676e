"""Asking models questions; accuracy with the no-answer ratio, intervals, paired comparisons, results files."""
