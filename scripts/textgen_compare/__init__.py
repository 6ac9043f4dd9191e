"""Our server and other engines on the same prompts, taking turns: prompts, load, engines, figures, report."""
