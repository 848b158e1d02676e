"""Summary, tables of evaluations, trees in the terminal, and one self-contained HTML page for a run."""
