"""Logits to token ids: parameters, penalties, masks, filters and counter-based randomness."""
