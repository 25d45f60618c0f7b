"""What keeps stores healthy: retention, copies, and changes of the set of stores."""
