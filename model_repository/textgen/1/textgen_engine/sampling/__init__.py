"""Logits to token ids: parameters, penalties, masks, filters and counter-based randomness.

    params.py      what a request asked; no torch       sampler.py     the order of the steps; the room's front door
    penalties.py   edits of logits, history per slot    masks.py       grammar bit masks
    filters.py     top_k, top_p, typical_p, min_p       randomness.py  hash, noise, the race
    watermark.py   the green list; no torch             rows.py        row sets, state per slot

Import from the files: a process that needs `params` alone must not load torch.
"""
