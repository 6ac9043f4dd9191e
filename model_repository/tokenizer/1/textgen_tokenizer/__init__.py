"""Text and chat messages to token ids, and back. A plain Python package: importable, and tested, without Triton.

`TokenizerService` (service.py) answers one request at a time; around it stand its configuration (config.py), the
loading of a checkpoint's tokenizer (loading.py), the parameters a request may carry (options.py), chat messages and
templates (chat.py), and the errors with their public texts (errors.py).
"""
