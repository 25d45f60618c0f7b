"""Object stores: everything that fsspec knows, and S3 through obstore."""
