"""What generated blocks say, one file for each page."""
