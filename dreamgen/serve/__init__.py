"""Policy servers for the protocols that robots already speak, and clients of them that are policies themselves."""
