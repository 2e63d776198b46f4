"""What watches a run: one callback, and the records, intervals, signals and stragglers it looks after."""
