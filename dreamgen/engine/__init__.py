"""The one training loop, its precision and its progress bars."""
