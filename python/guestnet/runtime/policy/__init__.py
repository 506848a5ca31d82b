"""What a policy needs while its network runs."""
