"""What the gateway serves to guests: addresses (DHCP) and names (DNS). Nothing here knows the data plane."""
