"""textgen_engine: continuous-batching text generation on PyTorch, importable without Triton and without a GPU.

The engine knows token ids, tensors and requests; it knows nothing of Triton, HTTP or gRPC. `config` builds it,
`process` runs it in a process of its own, `engine.Engine` runs it in the caller's process.
"""
