"""What is wrong with a trained model's batch norms, from evidence: causes, costs and cures."""
