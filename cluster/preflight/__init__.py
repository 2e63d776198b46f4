"""Whether nodes are fit to train, before the money is spent: checks, their verdict, and who asks for them."""
