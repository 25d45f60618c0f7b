"""Real S3 servers, a proxy that spoils requests, certificates, and the fixtures over them."""
