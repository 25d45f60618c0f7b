"""A serving group: who of its replicas serves, who stands by, and what operators asked for."""
