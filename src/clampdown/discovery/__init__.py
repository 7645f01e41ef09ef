"""Discovery: finders that rank an SAE's features by their part in refusal, and the causal check of their finalists."""
