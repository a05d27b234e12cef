"""`python -m misstep`: the command line, as `accelerate launch -m misstep` starts it."""

from misstep.cli import main

main()
