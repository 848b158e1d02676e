"""Shared foundations: errors, atomic files, rows, progress, statistics, settings, run folders."""
