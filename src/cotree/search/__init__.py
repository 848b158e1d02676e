"""Monte Carlo tree search over thoughts."""
