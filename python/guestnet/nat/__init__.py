"""The NAT engine by itself: packets in memory and captures in files."""
