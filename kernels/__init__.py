"""GPU kernels launched from Python (Triton, and CUDA through CuPy). This release computes on CPUs; they come next."""
