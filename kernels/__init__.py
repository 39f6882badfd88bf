"""GPU kernels launched from Python: Triton, and csrc/cuda through CuPy. Nothing here is imported before its first use."""
