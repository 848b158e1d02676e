"""A local page that shows a run, its trees above all, and takes annotations of chains."""
