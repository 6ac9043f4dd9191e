"""What each method of quantization costs and saves: packers for checkpoints, measurements, the page."""
