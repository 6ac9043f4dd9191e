"""Attention over the paged KV cache: one interface (base.py), its backends, and the bridge into transformers."""
