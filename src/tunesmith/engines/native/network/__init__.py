"""The transformer network on the CPU: weights, packed linear layers, attention, forward passes."""
