"""Engines: one contract, a batch of conversations in, completions out."""
