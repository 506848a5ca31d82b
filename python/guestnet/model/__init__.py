"""What a network is made of, as values: its configuration, events, counters and addresses."""
