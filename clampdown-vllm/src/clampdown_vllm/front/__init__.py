"""Where requests come in: names to plans, prompts to positions, gates to verdicts, and receipts to replies."""
