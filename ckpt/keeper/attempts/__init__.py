"""Who runs: the state of a launch's attempts, their failures and hangs."""
