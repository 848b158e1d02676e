"""The evaluation table for the terminal and Markdown, and one self-contained HTML page for a run."""
