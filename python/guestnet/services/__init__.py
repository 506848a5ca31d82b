"""What the gateway serves: addresses (DHCP), names (DNS), ports (PCP). Nothing here knows the data plane."""
