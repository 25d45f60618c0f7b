"""The cluster side of a job with several nodes. Imported only for such a job."""
