"""What a run showed: one HTML file that opens without a server, and the figures as `results.json`."""
