"""What runs on the nodes of a job: attempts and their records, heartbeats, rendezvous, and the tasks' ranks."""
