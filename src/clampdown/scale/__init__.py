"""One command on many machines: shards that any scheduler can start, their merging, and the same on Ray's actors."""
