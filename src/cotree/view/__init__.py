"""The viewer: a local web page that shows a run and its trees, and takes annotations of chains."""
