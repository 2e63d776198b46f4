"""Jobs on clusters, from both ends: what submits one, and what runs in each of its tasks."""
