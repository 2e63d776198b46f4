"""This machine: its facts, its health, and the compiled extensions that DeepSpeed needs on it."""
