"""A recipe as an experiment: a graph of named nodes, their fingerprints, and running them in order."""
