"""Checkpoints to running models; with attention/bridge.py the only code that knows transformers' internals."""
