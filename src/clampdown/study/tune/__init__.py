"""The search for the plan that refuses most within budgets."""
