"""Code for particular hardware, each piece beside the PyTorch operations it must agree with."""
