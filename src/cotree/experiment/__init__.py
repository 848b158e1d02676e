"""A recipe as an experiment: named nodes, what decides their content, and running them in order."""
