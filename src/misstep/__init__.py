"""misstep: a language model learns from its own mistakes.

Collect mistakes, let the model analyse them under guidance, train on the analyses without it,
answer with guidance, and measure on held-out prompts what changed and what it cost.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
