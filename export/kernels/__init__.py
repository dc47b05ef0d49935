"""Kernels of our own, all optional: what a target's own operators cannot say in one pass over memory.

kv_attention    one decode step of attention over a quantized cache: torch op, its reference, and the launch of the Triton kernels
_kv_triton      the two Triton kernels (imported when a launch needs them: `pip install 'foveate[triton]'`)
trt_plugin      the same kernels inside a TensorRT engine (classic TensorRT only; TensorRT-RTX has no plug-ins)

A kernel is a file with a plain torch reference beside it; the test runs both, under Triton's interpreter where there is no GPU.
"""
