"""The commit log: a pure fold, a journal that appends, sequencers, and copies on several stores."""
