"""The commit log: a pure fold over records, and the journal that writes them to the stores."""
