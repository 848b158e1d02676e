"""Summary, evaluation tables, trees in the terminal, and a self-contained HTML report of a run."""
