"""Pre-trained Model Averaging: the checkpoints of one pre-training run, averaged into a better model."""
