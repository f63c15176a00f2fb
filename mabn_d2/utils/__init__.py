"""Files that are whole or not there, and random number generators."""
