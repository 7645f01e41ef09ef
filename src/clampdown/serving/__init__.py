"""Serve a steered model: the engine that decodes requests of many plans together, and the HTTP API before it."""
