"""A network that runs: its control thread, endpoints, attachments, published ports and services."""
