"""How Lightning is set up: its options by name and type, and DeepSpeed ZeRO as one of its strategies."""
