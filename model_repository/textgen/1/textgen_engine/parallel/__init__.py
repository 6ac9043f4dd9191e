"""One model over several processes: who holds which part, how the parts talk, what happens when one is lost."""
