"""Training rows, the loss on them, and the loop: what `stages/train.py` is made of."""
