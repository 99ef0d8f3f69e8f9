"""Decode steps on the GPU: our own CUDA kernels as operators of an ONNX Runtime graph."""
