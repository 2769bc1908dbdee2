"""The operations of a training step, one per module: a Triton kernel or library call for GPUs, and the same function in
plain PyTorch for CPUs."""
