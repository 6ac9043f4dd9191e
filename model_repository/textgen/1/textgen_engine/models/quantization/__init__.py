"""Linear layers with quantized weights: one file for each method, and which of them an option or a checkpoint means."""
