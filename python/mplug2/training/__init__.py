"""Training: recipes, the optimizer, the steps, and runs that can be resumed."""
