"""Activations: forward up to a site, encode in chunks, pool per prompt, keep a sparse matrix and mergeable moments."""
