"""Data: from what a recipe names to samples that a task trains on: files, corpora, tokenizers, tokens, images."""
