"""Beside the model: what the op at a site reads, whose each token is, and what was counted."""
