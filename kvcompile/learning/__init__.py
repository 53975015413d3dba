"""Learning head classes: gates per KV head, attention mixed of two sets, the losses and the optimiser."""
