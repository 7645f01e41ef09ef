"""Training an SAE for a model that has none, and measuring any SAE on a model; `saes` holds what an SAE is."""
