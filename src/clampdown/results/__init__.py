"""What a run found, typed: one schema that every command writes and every reader reads. No torch."""
