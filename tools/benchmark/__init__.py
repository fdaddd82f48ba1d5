"""See __main__.py."""

HELD_OUT = 0.1  # of the training images: what is chosen is chosen on these
