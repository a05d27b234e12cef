"""Numbers out: intervals, paired tests, agreement, and the files that hold them."""
