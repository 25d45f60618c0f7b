"""The front door of a serving group: which replica gets a request, and what happens if it fails."""
