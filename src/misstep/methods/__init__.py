"""Methods: one class in one file each, named by a plain dict in `registry`."""
