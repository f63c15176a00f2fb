"""What the norms cost: time and memory of a forward and backward pass."""
