"""Techniques that train a model to be smaller: quantization, distillation, low rank, shared weights, early exit."""
