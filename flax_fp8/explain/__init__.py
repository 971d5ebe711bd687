"""What the GPU compiler really does with a program, without a GPU if need be."""
