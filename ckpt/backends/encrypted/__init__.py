"""A store whose objects are encrypted before they leave the machine."""
