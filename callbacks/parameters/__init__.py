"""Parameters wherever they lie: the sharded-state accessor, which layers there are, and cuts of them."""
