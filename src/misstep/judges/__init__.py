"""Judges: one contract, responses in, scores or "unscored, because ..." out."""
