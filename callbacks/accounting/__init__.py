"""What a run has spent and when it must end: clock, budget, meters, and the accountant that reads them."""
