"""What safety costs: strength sweeps, the choice of a strength, and the frontier."""
