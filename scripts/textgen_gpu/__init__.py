"""What scripts/gpu_check.py is made of. Needs torch, transformers and Triton's language, and of the engine no more than
imports with these: no server, no grammar library, no test runner."""
