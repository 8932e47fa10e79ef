"""The engine: whole networks on many chip samples, in C++ or CUDA."""
