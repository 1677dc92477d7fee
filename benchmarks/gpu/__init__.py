"""What the GPU benchmarks share; imported by the scripts one folder up."""
