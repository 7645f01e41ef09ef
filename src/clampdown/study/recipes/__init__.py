"""Recipes: a published pipeline as one file. `schema` is the file, `dry_run` checks it offline, `run` runs it."""
