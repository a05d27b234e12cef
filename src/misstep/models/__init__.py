"""Weights and tokens: where a model lies, what names it, how it loads and how it is asked."""
