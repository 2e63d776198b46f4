"""From a recipe and a machine to a plan: what will run, what it will cost, and why."""
