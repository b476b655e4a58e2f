"""The CPU engine of this project: network, C++ kernels, adapters under training, decoding."""
