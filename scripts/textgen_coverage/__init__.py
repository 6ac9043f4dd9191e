"""Which causal language models of transformers the engine serves: tiny random checkpoints, tried one by one."""
