"""What tests take for NVIDIA Apex where there is none: the interface that commlab uses, on CPU tensors, in torch."""
