"""Language models: where their decoder blocks are, how their chat template marks turns, loading and generation."""
