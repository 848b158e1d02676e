"""What every other package stands on: errors, files that a kill cannot tear, rows, progress, statistics."""
