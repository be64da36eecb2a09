"""The update: batches, log-probs, losses, optimizer, one jitted step, checkpoints."""
