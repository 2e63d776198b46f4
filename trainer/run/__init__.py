"""The training path: `fit` builds a plan's task and trains it with `Trainer`, Lightning with a budget."""
