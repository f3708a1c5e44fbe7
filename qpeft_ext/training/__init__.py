"""`QPeftTrainer`, its examples, losses and checkpoints."""
