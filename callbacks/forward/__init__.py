"""What happens around a forward pass: blocks, outputs, the weights that layers see, and terms of the loss."""
