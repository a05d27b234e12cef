"""Speed beside peers: the same work by turns in one run, each side in its own process."""
